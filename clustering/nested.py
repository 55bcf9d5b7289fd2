"""Coarser clusters that are unions of the clusters of a clustering, for training in rounds."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from clustering.clustering import Clustering
from clustering.errors import UserError
from clustering.grouping import RULES
from clustering.names import name_clusters

Clusters = dict[str, tuple[str, ...]]

_BETWEEN: Mapping[str, Callable[[np.ndarray], float]] = {
    "pairs": lambda far: float(far.min()),
    "single": lambda far: float(far.min()),
    "average": lambda far: float(far.mean()),
    "complete": lambda far: float(far.max()),
    "balanced": lambda far: float(far.mean()),
}
"""Rule -> distance between two clusters, from all distances between their languages."""


def nested(clustering: Clustering, counts: Sequence[int]) -> list[Clusters]:
    """Clusters of each count, coarse to fine, by name; the finest are those of the clustering.

    The clusters of a round are made of those of the next finer round, by the rule and the distances
    that made the clustering, so that each finer cluster lies in exactly one coarser. UserError
    unless the counts ascend and end with the number of clusters, and for a clustering without
    distances."""
    finest = len(clustering.clusters)
    rising = all(a < b for a, b in itertools.pairwise(counts))
    if len(counts) < 2 or not rising or counts[0] < 1 or counts[-1] != finest:
        given = ",".join(map(str, counts))
        raise UserError(
            f"rounds are two or more ascending numbers of clusters, of which the last is the "
            f"{finest} of the clustering; got {given}"
        )
    if clustering.distances is None:
        raise UserError(
            f"rounds need clusters of languages with distances between them; {clustering.method} "
            "has none"
        )
    levels = [dict(clustering.clusters)]
    for count in reversed(counts[:-1]):
        levels.insert(0, _coarser(levels[0], clustering, count))
    return levels


def _coarser(finer: Clusters, clustering: Clustering, count: int) -> Clusters:
    distances, rule = clustering.distances, clustering.parameters.get("rule", "pairs")
    assert distances is not None
    place = {tag: number for number, tag in enumerate(clustering.languages)}
    groups = [[place[tag] for tag in members] for members in finer.values()]
    values = np.zeros((len(groups), len(groups)))
    for a, first in enumerate(groups):
        for b, second in enumerate(groups):
            if a != b:
                values[a, b] = _BETWEEN[rule](distances.values[np.ix_(first, second)])
    more = {}
    if sizes := clustering.parameters.get("sizes"):
        more = {"sizes": np.array([sum(sizes[t] for t in m) for m in finer.values()], float)}
    found = RULES[rule](tuple(finer), values, count, **more)
    unions = [
        sorted((t for n in names for t in finer[n]), key=place.__getitem__)
        for names in found.groups
    ]
    return name_clusters(sorted(unions, key=lambda tags: place[tags[0]]))
