"""Distances between languages -> groups, by joining pairs of groups (single linkage).

Knows two rules. `balanced` joins in rounds of greedy closest pairs, as the authors of X-ELM do, so
sizes stay equal; `free` joins the closest pair each time, whatever the sizes. Does not know where
distances come from.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from clustering.errors import UserError

Group = tuple[int, ...]
"""Positions of languages, ascending."""
Join = tuple[Group, Group, float]


class Merge(NamedTuple):
    """One join of the tree."""

    members_a: tuple[str, ...]
    """Languages of the one side, in the given order."""
    members_b: tuple[str, ...]
    """Languages of the other side."""
    distance: float
    """Single-linkage distance: that of the closest two languages across the sides."""


class Grouping(NamedTuple):
    """What a rule found."""

    groups: list[tuple[str, ...]]
    """Exactly k groups; members and groups in the order in which the languages were given."""
    merges: list[Merge]
    """All n-1 joins up to one group. The first n-k made `groups`; those above them are by `free`,
    for the picture."""


def balanced(
    languages: Sequence[str], distances: Float[np.ndarray, "languages languages"], k: int
) -> Grouping:
    """Exactly k groups whose sizes differ by at most one.

    For n = k * 2^r languages this is the authors' algorithm (X-ELM section 3.1,
    `lang_clustering.py`): r rounds, each pairing every group with another, closest free pair first.
    Theirs loses a language when a round is odd and misses k when n/k is no power of two. Here a
    first, partial round joins only as many closest pairs as leave k * 2^r groups, so no later round
    is odd; and in a round with two sizes, q and q+1, two groups of the rarer size are never paired,
    which keeps sizes within one.
    """
    _check_k(k, len(languages))
    groups: list[Group] = [(i,) for i in range(len(languages))]
    joins: list[Join] = []
    linkage = distances
    while len(groups) > k:
        goal = k
        while 2 * goal < len(groups):
            goal *= 2
        pairs = _closest_pairs(linkage, [len(group) for group in groups], len(groups) - goal)
        groups, linkage, joined = _join(groups, linkage, pairs)
        joins += joined
    return _named(languages, groups, joins, linkage)


def free(
    languages: Sequence[str], distances: Float[np.ndarray, "languages languages"], k: int
) -> Grouping:
    """Exactly k groups of any size: agglomerative clustering with single linkage, cut at k."""
    _check_k(k, len(languages))
    groups: list[Group] = [(i,) for i in range(len(languages))]
    joins: list[Join] = []
    linkage = distances
    while len(groups) > k:
        groups, linkage, joined = _join(groups, linkage, [_closest(linkage)])
        joins += joined
    return _named(languages, groups, joins, linkage)


def linkage_matrix(
    languages: Sequence[str], merges: Sequence[Merge], gap: float = 0.0
) -> Float[np.ndarray, "joins 4"]:
    """The tree as SciPy's dendrogram wants it: rows of (node, node, height, members).

    A forced pair may be farther apart than a later join above it. A height is therefore at least
    `gap` above those of the joins below, so the tree draws without crossings; `Merge.distance`
    keeps the measured value.
    """
    nodes: dict[tuple[str, ...], int] = {
        (language,): number for number, language in enumerate(languages)
    }
    position = {language: number for number, language in enumerate(languages)}
    heights = dict.fromkeys(range(len(languages)), 0.0)
    rows = []
    for merge in merges:
        a, b = nodes[merge.members_a], nodes[merge.members_b]
        node = len(heights)
        below = [heights[side] + gap for side in (a, b) if side >= len(languages)]
        heights[node] = max(merge.distance, *below, 0.0)
        members = tuple(sorted(merge.members_a + merge.members_b, key=position.__getitem__))
        nodes[members] = node
        rows.append((min(a, b), max(a, b), heights[node], len(members)))
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def _check_k(k: int, languages: int) -> None:
    if not 1 <= k <= languages:
        raise UserError(f"k must be between 1 and {languages} languages; got {k}")


def _closest(linkage: np.ndarray) -> tuple[int, int]:
    rows, columns = np.triu_indices(len(linkage), k=1)
    best = np.argmin(linkage[rows, columns])
    return int(rows[best]), int(columns[best])


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
    """The groups by name, with the joins that made them and, by `free`, those above them."""
    above, every = groups, list(joins)
    while len(above) > 1:
        above, linkage, joined = _join(above, linkage, [_closest(linkage)])
        every += joined

    def name(group: Group) -> tuple[str, ...]:
        return tuple(languages[index] for index in group)

    return Grouping(
        groups=[name(group) for group in sorted(groups)],
        merges=[Merge(name(a), name(b), distance) for a, b, distance in every],
    )
