"""Balanced clustering of languages: groups of near languages whose sizes stay within bounds.

The method is k-medoids with capacities, whose assignment step SciPy solves exactly, followed by
swaps and moves. A size is a number of languages, or of anything else, such as tokens.
"""

from collections.abc import Sequence
from itertools import combinations
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

from clustering.agglomerative import join_within
from clustering.errors import UserError
from clustering.tree import DistanceMatrix, Grouping

SLACK = 1.25
"""Largest size of a group over the mean, where sizes are not numbers of languages."""
_ROUNDS = 50
"""Number of rounds of assignment and new medoids, at most; a handful is usual."""
_SECONDS = 20.0
"""Time limit in seconds of one assignment by tokens, whose optimum can be hard to prove."""


class Bounds(NamedTuple):
    """Least and largest sum of the sizes of a group's members."""

    least: float
    most: float


def balanced(
    languages: Sequence[str],
    distances: DistanceMatrix,
    k: int,
    sizes: Float[np.ndarray, " languages"] | None = None,
) -> Grouping:
    """k groups of near languages, with equal numbers of languages (within one), or with `sizes` at
    most `SLACK` times the mean size (or the largest language's size, if that is more).

    Medoids are chosen in turn (Kaufman and Rousseeuw 1990). Then languages are assigned at the
    least total distance within the bounds, and medoids chosen again, until nothing changes. Last,
    languages are swapped or moved while that lowers the sum over languages of the mean distance to
    the others of their group. UserError if no groups of such sizes are found."""
    weights = np.ones(len(languages)) if sizes is None else sizes
    bounds = even(len(languages), k) if sizes is None else at_most(sizes, k)
    labels = _medoids(distances, weights, k, bounds)
    labels = improved(distances, labels, weights, bounds)
    groups = [np.flatnonzero(labels == group).tolist() for group in range(k)]
    return join_within(languages, distances, groups)


def even(count: int, k: int) -> Bounds:
    """Bounds for equal numbers of languages, within one of each other; k is at most `count`."""
    return Bounds(count // k, -(-count // k))


def at_most(sizes: np.ndarray, k: int) -> Bounds:
    """Bounds of at most `SLACK` times the mean size, or the largest language's size."""
    return Bounds(0.0, max(SLACK * float(sizes.sum()) / k, float(sizes.max())))


def _medoids(
    distances: np.ndarray, weights: np.ndarray, k: int, bounds: Bounds
) -> Integer[np.ndarray, " languages"]:
    medoids = _first_medoids(distances, k)
    labels = np.zeros(0, int)
    for _ in range(_ROUNDS):
        labels = assign(distances[:, medoids], weights, bounds)
        totals = np.where(labels == labels[:, None], distances, 0).sum(axis=1)
        groups = [np.flatnonzero(labels == group) for group in range(k)]
        chosen = [int(group[totals[group].argmin()]) for group in groups]
        if chosen == medoids:
            break
        medoids = chosen
    return labels


def _first_medoids(distances: np.ndarray, k: int) -> list[int]:
    """Positions of k medoids, each chosen to lower the total distance to the nearest one most."""
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
    """The group of each language, at the least total cost within the bounds; none is empty."""
    if bounds.least:
        return _assign_evenly(costs, int(bounds.least))
    from scipy import optimize, sparse

    count, k = costs.shape
    once = sparse.kron(sparse.eye_array(count), np.ones((1, k)))
    members = sparse.kron(np.ones((1, count)), sparse.eye_array(k))
    totals = sparse.kron(weights[None, :], sparse.eye_array(k))
    result = optimize.milp(
        costs.ravel(),
        integrality=np.ones(count * k),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(once, 1, 1),
            optimize.LinearConstraint(members, 1, np.inf),
            optimize.LinearConstraint(totals, 0, bounds.most),
        ],
        options={"time_limit": _SECONDS},
    )
    if result.x is None:
        raise UserError(
            f"{count} languages do not go into {k} clusters of at most {bounds.most:,.0f} each; "
            "choose fewer clusters"
        )
    return result.x.reshape(count, k).argmax(axis=1)


def _assign_evenly(costs: np.ndarray, least: int) -> np.ndarray:
    """The group of each language where each group has `least` members or one more.

    SciPy assigns languages to places: `least` in each group that must be taken, and one that may
    stay free. Rows of no cost stand for free places, and may take no other."""
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
    """Labels after swapping two languages or moving one, while the bounds allow it and it lowers
    the sum over languages of the mean distance within groups."""
    labels = labels.copy()
    while True:
        swaps = _swaps(distances, labels, weights, bounds)
        moves = _moves(distances, labels, weights, bounds)
        groups = [np.flatnonzero(labels == group) for group in range(labels.max() + 1)]
        found: list[tuple[float, tuple[int, int], dict[int, int]]] = []
        for a, b in combinations(range(len(groups)), 2):
            of_pair = swaps[np.ix_(groups[a], groups[b])]
            one, other = np.unravel_index(of_pair.argmin(), of_pair.shape)
            i, j = int(groups[a][one]), int(groups[b][other])
            found.append((float(swaps[i, j]), (a, b), {i: b, j: a}))
            for here, there in ((a, b), (b, a)):
                i = int(groups[here][moves[groups[here], there].argmin()])
                found.append((float(moves[i, there]), (a, b), {i: there}))
        # A change in two groups leaves the gains in all others valid, so many are made at once.
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
    """Change of the cost by swapping two languages of different groups; inf where not allowed."""
    sums, counts = _sums(distances, labels), np.bincount(labels)
    # Change of the sum over pairs in the group of i if j were in its place.
    change = sums[:, labels].T - sums[np.arange(len(labels)), labels][:, None] - distances
    change *= 2.0 / np.maximum(counts[labels] - 1, 1)[:, None]
    totals = np.bincount(labels, weights)[labels]
    allowed = _within((totals - weights)[:, None] + weights, bounds)
    return np.where(allowed & allowed.T, change + change.T, np.inf)


def _moves(
    distances: np.ndarray, labels: np.ndarray, weights: np.ndarray, bounds: Bounds
) -> Float[np.ndarray, "languages groups"]:
    """Change of the cost by moving a language to another group; inf where not allowed."""
    sums, counts = _sums(distances, labels), np.bincount(labels)
    own = sums[np.arange(len(labels)), labels]
    pairs = np.bincount(labels, own) / 2
    cost = _cost(pairs, counts)
    left = _cost(pairs[labels] - own, counts[labels] - 1) - cost[labels]
    joined = _cost(pairs + sums, counts + 1) - cost
    totals = np.bincount(labels, weights)
    may_leave = _within(totals[labels] - weights, bounds) & (counts[labels] > 1)
    allowed = may_leave[:, None] & _within(totals + weights[:, None], bounds)
    return np.where(allowed, left[:, None] + joined, np.inf)


def _cost(pairs: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sum over members of their mean distance to the others, from the sum over pairs."""
    return 2.0 * pairs / np.maximum(counts - 1, 1)


def _sums(distances: np.ndarray, labels: np.ndarray) -> Float[np.ndarray, "languages groups"]:
    """Sum of the distances from each language to the members of each group."""
    return distances @ (labels[:, None] == np.arange(labels.max() + 1))


def _within(sizes: np.ndarray, bounds: Bounds) -> Bool[np.ndarray, "..."]:
    rounding = 1e-9 * max(abs(bounds.most), 1.0)
    return (sizes >= bounds.least - rounding) & (sizes <= bounds.most + rounding)
