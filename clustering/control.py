"""Clusters without a measurement: random ones, as the control of an experiment, and ones by
hand."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clustering import files
from clustering.clustering import Clustering
from clustering.errors import UserError
from clustering.languages import canonical_all
from clustering.names import name_clusters


def random_clusters(languages: Sequence[str], k: int, random_seed: int) -> Clustering:
    """k random clusters whose sizes differ by at most one; the random seed decides them."""
    tags = canonical_all(languages)
    if not 1 <= k <= len(tags):
        raise UserError(f"k must be between 1 and {len(tags)} languages; got {k}")
    if random_seed < 0:
        raise UserError(f"the random seed must be 0 or more; got {random_seed}")
    order = np.random.default_rng(random_seed).permutation(len(tags))
    parts = sorted(sorted(part.tolist()) for part in np.array_split(order, k))
    return Clustering(
        method="random",
        parameters={"k": k, "random_seed": random_seed},
        clusters=name_clusters([tuple(tags[index] for index in part) for part in parts]),
        languages=tags,
    )


def read_groups(path: str | os.PathLike[str]) -> Clustering:
    """Clusters from a YAML file with lines such as `slavic: [bg, ru]`; languages under `unassigned`
    are in no cluster. UserError for a file of another shape, and as `by_hand`."""
    import yaml

    text = files.read_text(path)
    try:
        # As strings: other loaders read Norwegian (no) as the truth value false.
        value = yaml.load(text, Loader=yaml.BaseLoader)
        tree = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    lists = list(value.values()) if isinstance(value, dict) else [None]
    if not all(isinstance(m, list) and all(isinstance(tag, str) for tag in m) for m in lists):
        raise UserError(
            f"{path} must have lines such as 'slavic: [bg, ru]', a name and its languages"
        )
    # YAML keeps the last of equal names.
    names = [name.value for name, _ in tree.value]
    if twice := [name for name in value if names.count(name) > 1]:
        raise UserError(f"{path} names a cluster twice: {', '.join(twice[:5])}")
    unassigned = value.pop("unassigned", ())
    try:
        found = by_hand(value, unassigned)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return replace(found, made_from={Path(path).name: files.sha256(path)})


def by_hand(groups: Mapping[str, Sequence[str]], unassigned: Sequence[str] = ()) -> Clustering:
    """The given clusters, name -> languages; UserError if a language is unknown or in two."""
    tags = canonical_all([language for members in groups.values() for language in members])
    return Clustering(
        method="by-hand",
        clusters={name: canonical_all(members) for name, members in groups.items()},
        unassigned=canonical_all(unassigned),
        languages=tags,
    )
