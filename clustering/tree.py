"""The tree of languages that joins make, and the result of a rule: groups and a tree."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

DistanceMatrix = Float[np.ndarray, "languages languages"]
"""Distances between languages, all of them known."""


class Merge(NamedTuple):
    """One join of the tree."""

    members_a: tuple[str, ...]
    """Languages of one side, in the given order."""
    members_b: tuple[str, ...]
    """Languages of the other side."""
    distance: float
    """Distance between the two sides, as the rule measures it."""


class Grouping(NamedTuple):
    """Groups of languages, with the tree over them."""

    groups: list[tuple[str, ...]]
    """Exactly k groups; members and groups in the order in which the languages were given."""
    merges: list[Merge]
    """All n-1 joins up to one group; the first n-k made `groups`."""


def linkage_matrix(
    languages: Sequence[str], merges: Sequence[Merge], gap: float = 0.0
) -> Float[np.ndarray, "joins 4"]:
    """The tree in SciPy's format: rows of (node, node, height, number of members).

    A forced pair may be farther apart than a later join above it. Each height is therefore at least
    `gap` above those of the joins below it, so that lines do not cross; `Merge.distance` has the
    measured value."""
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
