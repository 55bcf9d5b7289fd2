"""Clustering of languages into groups of equal sizes, by rounds of closest pairs (single linkage).

This is the clustering of X-ELM's authors, for any number of languages.
"""

from collections.abc import Sequence

import numpy as np

from clustering.tree import DistanceMatrix, Grouping, Merge

Group = tuple[int, ...]
"""Positions of languages, ascending."""
Join = tuple[Group, Group, float]


def pairs(languages: Sequence[str], distances: DistanceMatrix, k: int) -> Grouping:
    """Exactly k groups whose sizes differ by at most one.

    For n = k * 2^r languages this is the authors' algorithm (X-ELM section 3.1,
    `lang_clustering.py`): r rounds, each pairing every group with another, closest free pair first.
    Theirs loses a language when a round is odd, and misses k when n/k is no power of two. Here a
    first, partial round joins only as many closest pairs as leave k * 2^r groups, so that no later
    round is odd. In a round with two sizes, q and q+1, two groups of the rarer size are never
    paired, which keeps sizes within one."""
    groups: list[Group] = [(i,) for i in range(len(languages))]
    joins: list[Join] = []
    linkage = distances
    while len(groups) > k:
        goal = k
        while 2 * goal < len(groups):
            goal *= 2
        closest = _closest_pairs(linkage, [len(group) for group in groups], len(groups) - goal)
        groups, linkage, joined = _join(groups, linkage, closest)
        joins += joined
    return _named(languages, groups, joins, linkage)


def _closest_pairs(linkage: np.ndarray, sizes: list[int], count: int) -> list[tuple[int, int]]:
    """`count` disjoint pairs, closest first; a full round (2 * count groups) keeps sizes even."""
    is_full = 2 * count == len(sizes)
    small = min(sizes)
    left = {True: sizes.count(small), False: len(sizes) - sizes.count(small)}
    unpaired = set(range(len(sizes)))
    pairs: list[tuple[int, int]] = []
    rows, columns = np.triu_indices(len(sizes), k=1)
    for at in np.argsort(linkage[rows, columns], kind="stable"):
        a, b = int(rows[at]), int(columns[at])
        if len(pairs) == count:
            break
        if a not in unpaired or b not in unpaired:
            continue
        a_small, b_small = sizes[a] == small, sizes[b] == small
        # Each group of the rarer size needs one of the other left over as its partner.
        if is_full and a_small == b_small and left[a_small] - 2 < left[not a_small]:
            continue
        unpaired -= {a, b}
        left[a_small] -= 1
        left[b_small] -= 1
        pairs.append((a, b))
    return pairs


def _join(
    groups: list[Group], linkage: np.ndarray, pairs: list[tuple[int, int]]
) -> tuple[list[Group], np.ndarray, list[Join]]:
    """The groups with `pairs` joined, the distances between them, and what was joined."""
    joined = [(groups[a], groups[b], float(linkage[a, b])) for a, b in pairs]
    paired = {index for pair in pairs for index in pair}
    sides = pairs + [(index, index) for index in range(len(groups)) if index not in paired]
    left, right = np.array(sides).T
    nearer = np.minimum(linkage[left], linkage[right])
    merged = [tuple(sorted({*groups[a], *groups[b]})) for a, b in sides]
    return merged, np.minimum(nearer[:, left], nearer[:, right]), joined


def _named(
    languages: Sequence[str], groups: list[Group], joins: list[Join], linkage: np.ndarray
) -> Grouping:
    """The groups as languages, with the joins that made them and, closest first, those above."""
    above, every = groups, list(joins)
    while len(above) > 1:
        closest = _closest_pairs(linkage, [1] * len(above), 1)
        above, linkage, joined = _join(above, linkage, closest)
        every += joined

    def name(group: Group) -> tuple[str, ...]:
        return tuple(languages[index] for index in group)

    return Grouping(
        groups=[name(group) for group in sorted(groups)],
        merges=[Merge(name(a), name(b), distance) for a, b, distance in every],
    )
