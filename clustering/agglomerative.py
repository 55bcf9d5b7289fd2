"""Agglomerative clustering: the closest groups of languages join until k are left."""

from collections.abc import Sequence

import numpy as np

from clustering.tree import DistanceMatrix, Grouping, Merge


def join(languages: Sequence[str], distances: DistanceMatrix, k: int, *, linkage: str) -> Grouping:
    """k groups of any size by SciPy's hierarchical clustering, with a linkage that takes any
    distances: single, average or complete."""
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    count = len(languages)
    nodes: list[tuple[int, ...]] = [(index,) for index in range(count)]
    merges: list[Merge] = []
    groups = set(nodes)
    # SciPy refuses a single language, which has no pair.
    rows = hierarchy.linkage(squareform(distances, checks=False), linkage) if count > 1 else []
    for a, b, distance, _ in rows:
        sides = nodes[int(a)], nodes[int(b)]
        nodes.append(tuple(sorted(sides[0] + sides[1])))
        if len(groups) > k:
            groups = groups - set(sides) | {nodes[-1]}
        first, second = (_named(languages, side) for side in sides)
        merges.append(Merge(first, second, float(distance)))
    return Grouping(groups=[_named(languages, group) for group in sorted(groups)], merges=merges)


def join_within(
    languages: Sequence[str], distances: DistanceMatrix, groups: Sequence[Sequence[int]]
) -> Grouping:
    """The given groups (positions of languages) with a tree that has each group as a branch.

    Languages join within groups first, then groups join; each time the two of the least mean
    distance."""
    label = np.empty(len(languages), int)
    for number, group in enumerate(groups):
        label[list(group)] = number
    # The same is added to every pair across groups, and so to every mean over such pairs.
    farther = 2.0 * float(distances.max(initial=0.0)) + 1.0
    spread = distances + farther * (label[:, None] != label)
    found = join(languages, spread, len(groups), linkage="average")
    across = len(languages) - len(groups)
    above = [merge._replace(distance=merge.distance - farther) for merge in found.merges[across:]]
    return found._replace(merges=found.merges[:across] + above)


def _named(languages: Sequence[str], group: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(languages[index] for index in group)
