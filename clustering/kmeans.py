"""Balanced k-means on vectors, in NumPy.

Knows how to find centres under a bound on cluster size (cluster-branch-train-merge, Gururangan et
al. 2023, arXiv 2303.14177, section 2.1). Balance holds only while fitting: afterwards `assign`
takes the nearest centre.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Integer

from clustering.errors import UserError

_ROWS_PER_CHUNK = 1 << 16
"""Rows whose distances are held at once by `assign`."""
_TEMPERATURES = tuple(np.geomspace(0.25, 0.02, 16))
"""Of the annealing, in mean squared distances of a vector to the mean of all. Warmer, clusters fall
into one; see docs/log.md for others that were tried."""
_ANNEALED_ROWS = 1 << 14
"""Rows that the annealing sees at most: where centres lie roughly, a sample tells."""
_SHARPNESS = 0.004
"""Temperature at which prices are found for an assignment, in medians of what the worst place costs
a row more than the best. About a hundredth of the rows is then left to move along paths, if none
are equal; colder prices take longer to find."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fit:
    """Centres and how well they fit the vectors they were fitted on."""

    centres: Float[np.ndarray, "C D"]
    """Means of the vectors of each cluster, float32."""
    labels: Integer[np.ndarray, " rows"]
    """Balanced cluster of each fitted row."""
    rows: Integer[np.ndarray, " rows"]
    """Indices of the vectors that were fitted on: of equal ones the first."""
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

    Zero rows (documents of unseen terms alone) are left out, and equal rows count once: they have
    the same nearest centre, so balance cannot divide them, and centres fitted to halves of them
    would lie on one point. The same arguments give the same result. Raises UserError for fewer
    different rows than k.
    """
    rng = np.random.default_rng(random_seed)
    rows = _different(vectors)
    points = vectors[rows].astype(np.float64)
    if not np.isfinite(points).all():
        raise ValueError("vectors must be finite; got NaN or infinity")
    if not 1 <= k <= len(points):
        raise UserError(
            f"k must be between 1 and {len(points)} different documents that are not empty; got {k}"
        )
    centres, prices = _annealed(points, k, rng)
    capacity = -(-len(points) // k)
    labels = np.full(len(points), -1)
    done = 0
    while done < iterations:
        done += 1
        previous = labels
        # Centres that move little leave prices nearly right.
        labels, prices = _place(_squared_distances(centres, points), capacity, prices)
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
        _squared_distances(centres, vectors[start : start + _ROWS_PER_CHUNK]).argmin(axis=0)
        for start in range(0, len(vectors), _ROWS_PER_CHUNK)
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def assign_balanced(
    costs: Float[np.ndarray, "rows C"], capacity: int
) -> Integer[np.ndarray, " rows"]:
    """Clusters of the rows at the least total cost, at most `capacity` rows in each.

    Exact to rounding of the largest cost. Prices of the clusters that make every row choose in
    balance are the dual of this transport problem; smoothed, it is a convex function of C numbers,
    minimised by L-BFGS (Cuturi 2013, arXiv 1306.0895, has the smoothing). What is left unbalanced
    moves along shortest paths between clusters, which keeps the assignment optimal at every step
    (Ahuja, Magnanti and Orlin 1993, section 9.7). Raises ValueError if the clusters cannot hold all
    rows, and for costs that are not finite.
    """
    return _place(np.ascontiguousarray(costs.T), capacity, np.zeros(costs.shape[1]))[0]


def _place(
    costs: Float[np.ndarray, "C rows"], capacity: int, prices: Float[np.ndarray, " C"]
) -> tuple[Integer[np.ndarray, " rows"], Float[np.ndarray, " C"]]:
    """Labels and prices, searched from the prices given."""
    clusters, rows = costs.shape
    spare = clusters * capacity - rows
    if spare < 0:
        raise ValueError(f"{clusters} clusters of at most {capacity} cannot hold {rows} rows")
    if not np.isfinite(costs).all():
        raise ValueError("costs must be finite; got NaN or infinity")
    # What a row costs wherever it is decides nothing, and would drown what does in rounding.
    costs = costs - costs.min(axis=0)
    # Rows that are happy anywhere fill the last places, so that every cluster is full.
    filled = np.concatenate([costs, np.zeros((clusters, spare))], axis=1)
    # Half of the rows, and not their mean, say how far apart places are: some may be outliers.
    scale = float(np.median(costs.max(axis=0))) or float(costs.max())
    prices, _ = _prices(filled, prices, _SHARPNESS * scale)
    labels = (filled + prices[:, None]).argmin(axis=0)
    _move_along_paths(filled, labels, prices, capacity)
    return labels[:rows], prices


def _prices(
    costs: Float[np.ndarray, "C rows"],
    prices: Float[np.ndarray, " C"],
    temperature: float,
    tolerance: float = 0.002,
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, "C rows"]]:
    """Prices at which the rows' shares in the clusters, by softmax of -(cost + price) over the
    temperature, are as large in every cluster to within `tolerance` of that; and these shares."""
    from scipy.optimize import minimize

    clusters, rows = costs.shape
    if temperature <= 0:  # one cluster, or rows that are all the same
        return prices, np.full(costs.shape, 1 / clusters)
    scaled = (costs / -temperature).astype(np.float32)
    shares = np.empty_like(scaled)

    def dual(scaled_prices: np.ndarray) -> tuple[float, np.ndarray]:
        np.subtract(scaled, scaled_prices.astype(np.float32)[:, None], out=shares)
        top = shares.max(axis=0)
        np.subtract(shares, top, out=shares)
        np.exp(shares, out=shares)
        total = shares.sum(axis=0)
        np.divide(shares, total, out=shares)
        value = np.mean(np.log(total) + top, dtype=np.float64) + scaled_prices.mean()
        return float(value), 1 / clusters - shares.sum(axis=1, dtype=np.float64) / rows

    found = minimize(
        dual,
        prices / temperature,
        jac=True,
        method="L-BFGS-B",
        options={"gtol": tolerance / clusters, "ftol": 0.0, "maxiter": 100},
    )
    dual(found.x)
    return found.x * temperature, shares


def _move_along_paths(
    costs: Float[np.ndarray, "C rows"],
    labels: Integer[np.ndarray, " rows"],
    prices: Float[np.ndarray, " C"],
    capacity: int,
) -> None:
    """Moves rows from clusters above `capacity` to those below, at the least cost, and changes
    `labels` and `prices` to match: every row is where cost and price are least, before and after.
    Rows of one cost, as equal documents have, move together."""
    sizes = np.bincount(labels, minlength=len(costs))
    if (sizes <= capacity).all():
        return
    lengths = np.stack([_lengths(costs, labels, cluster) for cluster in range(len(costs))])
    rounding = 1e-12 * float(np.median(costs.max(axis=0)))
    while (sizes > capacity).any():
        # Never negative but for rounding, as no row has a better place at these prices.
        reduced = np.maximum(lengths + prices - prices[:, None], 0.0)
        path, distances = _shortest_path(reduced, sizes > capacity, sizes < capacity)
        prices -= np.minimum(distances, distances[path[-1]])
        movers = []
        for source, target in pairwise(path):
            members = np.flatnonzero(labels == source)
            changes = costs[target, members] - costs[source, members]
            movers.append(members[changes <= lengths[source, target] + rounding])
        spare = (sizes[path[0]] - capacity, capacity - sizes[path[-1]])
        count = min(*spare, *map(len, movers))
        for target, rows in zip(path[1:], movers):
            labels[rows[:count]] = target
        sizes[path[0]] -= count
        sizes[path[-1]] += count
        for cluster in path:
            lengths[cluster] = _lengths(costs, labels, cluster)


def _lengths(costs: np.ndarray, labels: np.ndarray, cluster: int) -> Float[np.ndarray, " C"]:
    """What it costs at least to move a row of a cluster to each other; infinite without rows."""
    members = np.flatnonzero(labels == cluster)
    return (costs[:, members] - costs[cluster, members]).min(axis=1, initial=np.inf)


def _shortest_path(
    lengths: Float[np.ndarray, "C C"], starts: np.ndarray, ends: np.ndarray
) -> tuple[list[int], Float[np.ndarray, " C"]]:
    """From any of the starts to the nearest of the ends, by Dijkstra, and the distances of all
    clusters from the starts; those beyond that end are no less than its own."""
    distances, before = np.where(starts, 0.0, np.inf), np.full(len(lengths), -1)
    undone = np.ones(len(lengths), bool)
    while True:
        nearest = int(np.where(undone, distances, np.inf).argmin())
        undone[nearest] = False
        if ends[nearest]:
            break
        through = distances[nearest] + lengths[nearest]
        shorter = undone & (through < distances)
        distances[shorter], before[shorter] = through[shorter], nearest
    path = [nearest]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return path[::-1], distances


def _annealed(
    points: np.ndarray, k: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "C D"], Float[np.ndarray, " C"]]:
    """Centres and prices to start from: clusters of equal mass that begin blurred, over a falling
    temperature (deterministic annealing; Rose 1998, doi 10.1109/5.726788), from random rows."""
    centres = _distinct(points, k, rng)
    prices = np.zeros(k)
    if len(points) > _ANNEALED_ROWS:
        points = points[rng.choice(len(points), _ANNEALED_ROWS, replace=False)]
    spread = float(((points - points.mean(axis=0)) ** 2).sum(axis=1).mean())
    for temperature in _TEMPERATURES:
        costs = _squared_distances(centres, points)
        prices, shares = _prices(costs, prices, temperature * spread, tolerance=0.02)
        centres = (shares @ points) / shares.sum(axis=1, keepdims=True)
    return centres, prices


def _different(vectors: Float[np.ndarray, "documents D"]) -> Integer[np.ndarray, " rows"]:
    """Indices of the rows that are not zero, of equal ones the first."""
    first: dict[bytes, int] = {}
    for row in np.flatnonzero(np.any(vectors, axis=1)).tolist():
        first.setdefault(vectors[row].tobytes(), row)
    return np.array(list(first.values()), int)


def _distinct(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k random rows that differ; UserError if there are not so many."""
    chosen: list[int] = []
    unlike = np.ones(len(points), bool)
    least = 1e-12 * float(np.einsum("ND,ND->N", points, points).mean())
    while len(chosen) < k:
        left = np.flatnonzero(unlike)
        if not len(left):
            raise UserError(
                f"k must be at most the number of distinct documents, {len(chosen)}; got {k}"
            )
        chosen.append(int(rng.choice(left)))
        unlike[left] = _squared_distances(points[chosen[-1:]], points[left])[0] > least
    return points[chosen]


def _squared_distances(centres: np.ndarray, points: np.ndarray) -> np.ndarray:
    """[C, rows], so that what is best for each row is found along memory; float64 for float64
    points. Never below zero."""
    found = centres @ points.T
    found *= -2
    found += np.einsum("CD,CD->C", centres, centres)[:, None]
    found += np.einsum("ND,ND->N", points, points)
    return np.maximum(found, 0.0, out=found)


def _means(points: np.ndarray, labels: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Mean of each cluster's points; a cluster that no point needs keeps its centre."""
    means = [
        points[labels == index].mean(axis=0) if np.any(labels == index) else centre
        for index, centre in enumerate(centres)
    ]
    return np.stack(means)
