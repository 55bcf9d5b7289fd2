"""Balanced k-means on vectors, in NumPy.

Knows how to find centres under a bound on cluster size (cluster-branch-train-merge, Gururangan et
al. 2023, arXiv 2303.14177, section 2.1). Balance holds only while fitting: afterwards `assign`
takes the nearest centre.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

from clustering.errors import UserError

_ROWS_PER_CHUNK = 1 << 16
"""Rows whose distances are held at once by `assign`."""
_STEPS = (1.0, 0.1, 0.01, 0.001)
"""Steps of the auction, in standard deviations of the costs. Against linear_sum_assignment on 2,000
points the cost is higher by at most 3e-5 of itself; 100,000 points and 16 clusters of which one
holds 60 % take 0.4 to 4 s on one core, and up to 31 s without the coarse steps."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fit:
    """Centres and how well they fit the vectors they were fitted on."""

    centres: Float[np.ndarray, "C D"]
    """Means of the vectors of each cluster, float32."""
    labels: Integer[np.ndarray, " rows"]
    """Balanced cluster of each fitted row."""
    rows: Integer[np.ndarray, " rows"]
    """Indices of the vectors that were fitted on."""
    inertia: float
    """Mean squared distance of a fitted row to its centre."""
    iterations: int
    """Assignments made, including the last, which changed nothing unless the bound was met."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Fitted rows in each cluster."""
        return tuple(np.bincount(self.labels, minlength=len(self.centres)).tolist())

    @property
    def balance(self) -> float:
        """Largest cluster over the mean size; 1 is even."""
        return max(self.sizes) * len(self.centres) / len(self.labels)


def fit(
    vectors: Float[np.ndarray, "documents D"],
    k: int,
    random_seed: int,
    *,
    iterations: int = 50,
) -> Fit:
    """k centres of the vectors, each cluster holding at most ceil(rows / k) of them while fitting.

    Zero rows (documents of unseen terms alone) are left out. The same arguments give the same
    result. Raises UserError for fewer distinct rows than k.
    """
    rng = np.random.default_rng(random_seed)
    rows = np.flatnonzero(np.any(vectors, axis=1))
    points = vectors[rows].astype(np.float64)
    if not 1 <= k <= len(points):
        raise UserError(
            f"k must be between 1 and {len(points)} documents that are not empty; got {k}"
        )
    centres = _first_centres(points, k, rng)
    capacity = -(-len(points) // k)
    labels = np.full(len(points), -1)
    # Centres that move little leave prices nearly right: later auctions begin where the last ended.
    prices, steps = np.zeros(k), _STEPS
    done = 0
    while done < iterations:
        done += 1
        previous = labels
        labels, prices = _place(_squared_distances(points, centres), capacity, prices, steps)
        steps = _STEPS[-2:]
        centres = _means(points, labels, centres)
        if np.array_equal(labels, previous):
            break
    inertia = float(np.mean(np.sum((points - centres[labels]) ** 2, axis=1)))
    return Fit(
        centres=centres.astype(np.float32),
        labels=labels,
        rows=rows,
        inertia=inertia,
        iterations=done,
    )


def assign(
    vectors: Float[np.ndarray, "documents D"], centres: Float[np.ndarray, "C D"]
) -> Integer[np.ndarray, " documents"]:
    """The nearest centre of each vector, with no bound on sizes; ties go to the first."""
    parts = [
        _squared_distances(vectors[start : start + _ROWS_PER_CHUNK], centres).argmin(axis=1)
        for start in range(0, len(vectors), _ROWS_PER_CHUNK)
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def assign_balanced(
    costs: Float[np.ndarray, "rows C"], capacity: int
) -> Integer[np.ndarray, " rows"]:
    """Clusters of the rows at nearly the least total cost, at most `capacity` rows in each.

    An auction (Bertsekas 1988, doi 10.1007/BF02186476): unplaced rows bid for the cluster that is
    cheapest at present prices, as much as they may before the second becomes as good, plus a step;
    a full cluster keeps its highest bidders, and its price is the lowest bid kept. Coarse steps
    first find prices for the fine ones. The total is within rows * step of the optimum. Raises
    ValueError if the clusters cannot hold all rows.
    """
    return _place(costs, capacity, np.zeros(costs.shape[1]), _STEPS)[0]


def _place(
    costs: np.ndarray, capacity: int, prices: np.ndarray, steps: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Labels [rows] and prices [C] of auctions by ever finer steps, from the prices given."""
    rows, clusters = costs.shape
    spare = clusters * capacity - rows
    if spare < 0:
        raise ValueError(f"{clusters} clusters of at most {capacity} cannot hold {rows} rows")
    # Rows that are happy anywhere fill the last places: with every place taken at the end, prices
    # may be carried from a coarse auction to a fine one.
    filled = np.concatenate([costs, np.zeros((spare, clusters))])
    # A step that the rounding of the prices could swallow would never end.
    least = 1e-9 * max(1.0, float(np.abs(costs).max(initial=0.0)))
    prices = prices - prices.min()
    labels = np.zeros(0, np.int64)
    for step in steps:
        size = max(step * float(costs.std()), least)
        labels, prices = _auction(filled, capacity, prices, size)
    return labels[:rows], prices


def _auction(
    costs: np.ndarray, capacity: int, prices: np.ndarray, step: float
) -> tuple[np.ndarray, np.ndarray]:
    """Labels [rows] and the prices [C] at which each row is content to within `step`."""
    prices = prices.copy()
    bids = np.zeros(len(costs))
    labels = np.full(len(costs), -1)
    while len(unplaced := np.flatnonzero(labels < 0)):
        at = np.arange(len(unplaced))
        totals = costs[unplaced] + prices
        wanted = totals.argmin(axis=1)
        cheapest = totals[at, wanted]
        totals[at, wanted] = np.inf
        second = totals.min(axis=1) if costs.shape[1] > 1 else cheapest
        bids[unplaced] = prices[wanted] + (second - cheapest) + step
        labels[unplaced] = wanted
        for cluster in np.unique(wanted):
            members = np.flatnonzero(labels == cluster)
            if len(members) >= capacity:
                by_bid = members[np.argsort(-bids[members], kind="stable")]
                labels[by_bid[capacity:]] = -1
                prices[cluster] = bids[by_bid[capacity - 1]]
    return labels, prices


def _first_centres(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii 2007), the best of a few candidates at each step."""
    candidates = 2 + int(np.log(k))
    chosen = [int(rng.integers(len(points)))]
    nearest = _squared_distances(points, points[chosen])[:, 0]
    while len(chosen) < k:
        total = nearest.sum()
        if total <= 1e-12 * len(points):
            raise UserError(
                f"k must be at most the number of distinct documents, {len(chosen)}; got {k}"
            )
        drawn = rng.choice(len(points), candidates, p=nearest / total)
        after = np.minimum(nearest[:, None], _squared_distances(points, points[drawn]))
        best = int(after.sum(axis=0).argmin())
        chosen.append(int(drawn[best]))
        nearest = after[:, best]
    return points[chosen]


def _squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """[rows, C]; float64 for float64 points. Never below zero."""
    lengths = np.einsum("ND,ND->N", points, points)[:, None] + np.einsum(
        "CD,CD->C", centres, centres
    )
    return np.maximum(lengths - 2 * points @ centres.T, 0.0)


def _means(points: np.ndarray, labels: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Mean of each cluster's points; a cluster that no point needs keeps its centre."""
    means = [
        points[labels == index].mean(axis=0) if np.any(labels == index) else centre
        for index, centre in enumerate(centres)
    ]
    return np.stack(means)
