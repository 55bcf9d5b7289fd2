"""Clusters that no measurement made: the random control of an experiment, and groups that a user
names.

Knows language tags only.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from clustering.clustering import Clustering, name_clusters
from clustering.errors import UserError
from clustering.languages import canonical_all


def random_clusters(languages: Sequence[str], k: int, random_seed: int) -> Clustering:
    """k random clusters whose sizes differ by at most one; decided by the random seed."""
    tags = canonical_all(languages)
    if not 1 <= k <= len(tags):
        raise UserError(f"k must be between 1 and {len(tags)} languages; got {k}")
    order = np.random.default_rng(random_seed).permutation(len(tags))
    parts = sorted(sorted(part.tolist()) for part in np.array_split(order, k))
    return Clustering(
        method="random",
        parameters={"k": k, "random_seed": random_seed},
        clusters=name_clusters([tuple(tags[index] for index in part) for part in parts]),
        languages=tags,
    )


def by_hand(groups: Mapping[str, Sequence[str]], unassigned: Sequence[str] = ()) -> Clustering:
    """The given clusters, name -> languages; UserError if a language is unknown or in two."""
    tags = canonical_all([language for members in groups.values() for language in members])
    return Clustering(
        method="by-hand",
        parameters={},
        clusters={name: canonical_all(members) for name, members in groups.items()},
        unassigned=canonical_all(unassigned),
        languages=tags,
    )
