"""Distances between languages -> groups of near languages within bounds of size.

Knows k-medoids with capacities, whose assignment step SciPy solves exactly, and swaps and moves
afterwards. Sizes are numbers of languages, or anything a user wants in balance, as tokens.
"""

from collections.abc import Sequence
from itertools import combinations
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

from clustering.agglomerative import join_within
from clustering.errors import UserError
from clustering.tree import Grouping

SLACK = 1.25
"""How much larger than the mean a group may be, where sizes are not numbers of languages."""
_ROUNDS = 50
"""Of assigning and of choosing medoids anew; a handful is the rule."""
_SECONDS = 20.0
"""For one assignment by tokens, whose optimum may be hard to prove; by numbers it never is."""


class Bounds(NamedTuple):
    """What the sizes of the members of a group may sum up to."""

    least: float
    most: float


def balanced(
    languages: Sequence[str],
    distances: Float[np.ndarray, "languages languages"],
    k: int,
    sizes: Float[np.ndarray, " languages"] | None = None,
) -> Grouping:
    """k groups of near languages that are even in number, or, with `sizes`, at most `SLACK` times
    the mean (or as large as the largest language, if that is more).

    From medoids (Kaufman and Rousseeuw 1990) chosen in turn, languages are assigned at the least
    total distance that the bounds allow and medoids chosen anew, until nothing changes. Then
    languages are swapped or moved while that lowers the sum over languages of the mean distance to
    the others of their group. UserError if no groups of such sizes are found.
    """
    weights = np.ones(len(languages)) if sizes is None else np.asarray(sizes, float)
    bounds = even(len(languages), k) if sizes is None else at_most(weights, k)
    labels = _medoids(distances, weights, k, bounds)
    labels = improved(distances, labels, weights, bounds)
    groups = [np.flatnonzero(labels == group).tolist() for group in range(k)]
    return join_within(languages, distances, groups)


def even(count: int, k: int) -> Bounds:
    """Numbers of languages within one of each other; k is at most `count`."""
    return Bounds(count // k, -(-count // k))


def at_most(sizes: np.ndarray, k: int) -> Bounds:
    """`SLACK` times the mean size, or the largest language."""
    return Bounds(0.0, max(SLACK * float(sizes.sum()) / k, float(sizes.max())))


def mean_within(distances: np.ndarray, labels: np.ndarray) -> float:
    """Mean over languages of the mean distance to the others of their group; 0 for one alone."""
    sums, counts = _sums(distances, labels), np.bincount(labels)
    own = sums[np.arange(len(labels)), labels] / np.maximum(counts[labels] - 1, 1)
    return float(own.mean())


def _medoids(
    distances: np.ndarray, weights: np.ndarray, k: int, bounds: Bounds
) -> Integer[np.ndarray, " languages"]:
    medoids = _first_medoids(distances, k)
    labels = np.zeros(0, int)
    for _ in range(_ROUNDS):
        labels = assign(distances[:, medoids], weights, bounds)
        totals = np.where(labels == labels[:, None], distances, 0).sum(axis=1)
        chosen = [
            int(np.flatnonzero(labels == group)[totals[labels == group].argmin()])
            for group in range(k)
        ]
        if chosen == medoids:
            break
        medoids = chosen
    return labels


def _first_medoids(distances: np.ndarray, k: int) -> list[int]:
    """Each the language that lowers the total distance to the nearest medoid most."""
    chosen = [int(distances.sum(axis=0).argmin())]
    nearest = distances[chosen[0]]
    while len(chosen) < k:
        gains = np.maximum(nearest[:, None] - distances, 0).sum(axis=0)
        gains[chosen] = -1.0
        chosen.append(int(gains.argmax()))
        nearest = np.minimum(nearest, distances[chosen[-1]])
    return chosen


def assign(
    costs: Float[np.ndarray, "languages groups"],
    weights: Float[np.ndarray, " languages"],
    bounds: Bounds,
) -> Integer[np.ndarray, " languages"]:
    """A group for each language at the least total cost that keeps the bounds; none is empty."""
    if bounds.least:
        return _assign_evenly(costs, int(bounds.least))
    from scipy import optimize, sparse

    count, k = costs.shape
    once = sparse.kron(sparse.eye_array(count), np.ones((1, k)))
    members = sparse.kron(np.ones((1, count)), sparse.eye_array(k))
    held = sparse.kron(weights[None, :], sparse.eye_array(k))
    result = optimize.milp(
        costs.ravel(),
        integrality=np.ones(count * k),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(once, 1, 1),
            optimize.LinearConstraint(members, 1, np.inf),
            optimize.LinearConstraint(held, 0, bounds.most),
        ],
        options={"time_limit": _SECONDS},
    )
    if result.x is None:
        raise UserError(
            f"{count} languages do not go into {k} clusters of at most {bounds.most:,.0f} each; "
            "ask for fewer clusters"
        )
    return result.x.reshape(count, k).argmax(axis=1)


def _assign_evenly(costs: np.ndarray, least: int) -> np.ndarray:
    """As many places in each group as it must have, and one more, of which some stay free: these go
    to rows of no cost that may have no other."""
    from scipy.optimize import linear_sum_assignment

    count, k = costs.shape
    free = k * (least + 1) - count
    places = np.tile(np.arange(k), least + 1)
    table = np.zeros((count + free, k * (least + 1)))
    table[:count] = costs[:, places]
    table[count:, : k * least] = 1e3 * (1.0 + float(costs.max())) * count
    rows, columns = linear_sum_assignment(table)
    return places[columns[np.argsort(rows)]][:count]


def improved(
    distances: np.ndarray, labels: np.ndarray, weights: np.ndarray, bounds: Bounds
) -> Integer[np.ndarray, " languages"]:
    """Labels after swaps of two languages and moves of one that the bounds allow and that lower the
    sum over languages of the mean distance within groups, until there is none."""
    labels = labels.copy()
    while True:
        swaps, moves = (
            _swaps(distances, labels, weights, bounds),
            _moves(distances, labels, weights, bounds),
        )
        groups = [np.flatnonzero(labels == group) for group in range(labels.max() + 1)]
        found: list[tuple[float, tuple[int, int], dict[int, int]]] = []
        for a, b in combinations(range(len(groups)), 2):
            of_pair = swaps[np.ix_(groups[a], groups[b])]
            one, other = np.unravel_index(of_pair.argmin(), of_pair.shape)
            i, j = int(groups[a][one]), int(groups[b][other])
            found.append((float(of_pair[one, other]), (a, b), {i: b, j: a}))
            for here, there in ((a, b), (b, a)):
                i = int(groups[here][moves[groups[here], there].argmin()])
                found.append((float(moves[i, there]), (a, b), {i: there}))
        # What happens in two groups changes nothing for the others, so many are done at once.
        changed: set[int] = set()
        for change, pair, moved in sorted(found, key=itemgetter(0)):
            if change < -1e-12 and changed.isdisjoint(pair):
                changed.update(pair)
                for language, group in moved.items():
                    labels[language] = group
        if not changed:
            return labels


def _swaps(
    distances: np.ndarray, labels: np.ndarray, weights: np.ndarray, bounds: Bounds
) -> Float[np.ndarray, "languages languages"]:
    """What it would change to swap two languages of different groups; inf where bounds forbid."""
    sums, counts = _sums(distances, labels), np.bincount(labels)
    # Of the sum over the pairs in the group of i, were j there in its place.
    change = sums[:, labels].T - sums[np.arange(len(labels)), labels][:, None] - distances
    change *= 2.0 / np.maximum(counts[labels] - 1, 1)[:, None]
    held = np.bincount(labels, weights)[labels]
    allowed = _within((held - weights)[:, None] + weights, bounds)
    return np.where(allowed & allowed.T, change + change.T, np.inf)


def _moves(
    distances: np.ndarray, labels: np.ndarray, weights: np.ndarray, bounds: Bounds
) -> Float[np.ndarray, "languages groups"]:
    """What it would change to move a language to another group; inf where bounds forbid."""
    sums, counts = _sums(distances, labels), np.bincount(labels)
    own = sums[np.arange(len(labels)), labels]
    pairs = np.bincount(labels, own) / 2
    cost = _cost(pairs, counts)
    left = _cost(pairs[labels] - own, counts[labels] - 1) - cost[labels]
    joined = _cost(pairs + sums, counts + 1) - cost
    held = np.bincount(labels, weights)
    may_leave = _within(held[labels] - weights, bounds) & (counts[labels] > 1)
    allowed = may_leave[:, None] & _within(held + weights[:, None], bounds)
    return np.where(allowed, left[:, None] + joined, np.inf)


def _cost(pairs: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sum over members of their mean distance to the others, from the sum over pairs."""
    return 2.0 * pairs / np.maximum(counts - 1, 1)


def _sums(distances: np.ndarray, labels: np.ndarray) -> Float[np.ndarray, "languages groups"]:
    """Of the distances of each language to the members of each group."""
    return distances @ (labels[:, None] == np.arange(labels.max() + 1))


def _within(sizes: np.ndarray, bounds: Bounds) -> Bool[np.ndarray, "..."]:
    room = 1e-9 * max(abs(bounds.most), 1.0)
    return (sizes >= bounds.least - room) & (sizes <= bounds.most + room)
