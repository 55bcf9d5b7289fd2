"""Balanced k-means on vectors, in NumPy.

Centres are fitted under a bound on the size of clusters (cluster-branch-train-merge, Gururangan et
al. 2023, arXiv 2303.14177, section 2.1). The bound is for fitting alone: afterwards `assign` takes
the nearest centre.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Integer

from clustering.errors import UserError

_ITERATIONS = 50
"""Number of assignments at most."""
_ROWS_PER_CHUNK = 1 << 16
"""Number of rows whose distances `assign` computes at a time."""
_TEMPERATURES = tuple(np.geomspace(0.25, 0.02, 16))
"""Temperatures of the annealing, in mean squared distances of a vector to the mean of all. At
higher ones all clusters become one; docs/log.md has others that were tried."""
_ANNEALED_ROWS = 1 << 14
"""Number of rows that the annealing uses at most: a sample suffices for rough centres."""
_SHARPNESS = 0.004
"""Temperature of the prices for an assignment, in medians over rows of the largest cost less the
least. About a hundredth of the rows is then left to move along paths, if none are equal; prices at
lower temperatures take longer to find."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fit:
    """Centres and how well they fit the vectors they were fitted on."""

    centres: Float[np.ndarray, "C D"]
    """Means of the vectors of each cluster, float32."""
    labels: Integer[np.ndarray, " rows"]
    """Balanced cluster of each fitted row."""
    rows: Integer[np.ndarray, " rows"]
    """Indices of the vectors that were fitted on; of equal vectors the first."""
    inertia: float
    """Mean squared distance of a fitted row to its centre."""
    iterations: int
    """Number of assignments, including the last, which changed nothing unless the limit was met."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of fitted rows in each cluster."""
        return tuple(np.bincount(self.labels, minlength=len(self.centres)).tolist())


def fit(vectors: Float[np.ndarray, "documents D"], k: int, random_seed: int) -> Fit:
    """k centres of the vectors, with at most ceil(rows / k) rows in each cluster while fitting.

    Zero rows (documents of unseen terms alone) are left out, and equal rows count once: they have
    the same nearest centre, so they cannot be divided, and centres fitted to halves of them would
    coincide. The same arguments give the same result. Raises UserError for fewer different rows
    than k."""
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
    labels, done = np.full(len(points), -1), 0
    while done < _ITERATIONS:
        done += 1
        previous = labels
        # The last prices are a good start, since centres move little.
        labels, prices = assign_balanced(_squared_distances(centres, points), capacity, prices)
        centres = _means(points, labels, centres)
        if np.array_equal(labels, previous):
            break
    inertia = float(np.mean(np.sum((points - centres[labels]) ** 2, axis=1)))
    centres = centres.astype(np.float32)
    return Fit(centres=centres, labels=labels, rows=rows, inertia=inertia, iterations=done)


def assign(
    vectors: Float[np.ndarray, "documents D"], centres: Float[np.ndarray, "C D"]
) -> Integer[np.ndarray, " documents"]:
    """Index of the nearest centre of each vector, without a bound on sizes; the first of equals."""
    parts = [
        _squared_distances(centres, vectors[start : start + _ROWS_PER_CHUNK]).argmin(axis=0)
        for start in range(0, len(vectors), _ROWS_PER_CHUNK)
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def assign_balanced(
    costs: Float[np.ndarray, "C rows"], capacity: int, prices: Float[np.ndarray, " C"]
) -> tuple[Integer[np.ndarray, " rows"], Float[np.ndarray, " C"]]:
    """Clusters of the rows at the least total cost, at most `capacity` rows in each, and the prices
    of the clusters, which are searched from `prices`.

    Exact to rounding of the largest cost. Prices of the clusters that make every row choose in
    balance are the dual of this transport problem; smoothed, it is a convex function of C numbers,
    minimised by L-BFGS (Cuturi 2013, arXiv 1306.0895, has the smoothing). What is left unbalanced
    moves along shortest paths between clusters, which keeps the assignment optimal at every step
    (Ahuja, Magnanti and Orlin 1993, section 9.7). Raises ValueError if there are more rows than
    places, and for costs that are not finite."""
    clusters, rows = costs.shape
    spare = clusters * capacity - rows
    if spare < 0:
        raise ValueError(f"{clusters} clusters of at most {capacity} rows cannot have {rows} rows")
    if not np.isfinite(costs).all():
        raise ValueError("costs must be finite; got NaN or infinity")
    # A row's least cost does not affect the choice, and would only add rounding errors.
    costs = costs - costs.min(axis=0)
    # Rows without costs fill the last places, so that every cluster is full.
    filled = np.concatenate([costs, np.zeros((clusters, spare))], axis=1)
    # The median, since the mean would depend on outliers.
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
    """Prices at which the rows' shares in the clusters, the softmax of -(cost + price) over the
    temperature, sum to the same in every cluster within a relative `tolerance`; and these
    shares."""
    from scipy.optimize import minimize

    clusters, rows = costs.shape
    if temperature <= 0:  # one cluster, or equal rows
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

    options = {"gtol": tolerance / clusters, "ftol": 0.0, "maxiter": 100}
    found = minimize(dual, prices / temperature, jac=True, method="L-BFGS-B", options=options)
    dual(found.x)
    return found.x * temperature, shares


def _move_along_paths(
    costs: Float[np.ndarray, "C rows"],
    labels: Integer[np.ndarray, " rows"],
    prices: Float[np.ndarray, " C"],
    capacity: int,
) -> None:
    """Moves rows from clusters above `capacity` to those below, at the least cost, by changing
    `labels` and `prices` in place.

    Before and after, every row is in the cluster where cost plus price is least. Rows of equal
    costs, such as equal documents, move together."""
    sizes = np.bincount(labels, minlength=len(costs))
    if (sizes <= capacity).all():
        return
    lengths = np.stack([_lengths(costs, labels, cluster) for cluster in range(len(costs))])
    rounding = 1e-12 * float(np.median(costs.max(axis=0)))
    while (sizes > capacity).any():
        # Negative by rounding alone, since no row has a better cluster at these prices.
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
    """Least cost of moving a row of a cluster to each other cluster; inf without rows."""
    members = np.flatnonzero(labels == cluster)
    return (costs[:, members] - costs[cluster, members]).min(axis=1, initial=np.inf)


def _shortest_path(
    lengths: Float[np.ndarray, "C C"], starts: np.ndarray, ends: np.ndarray
) -> tuple[list[int], Float[np.ndarray, " C"]]:
    """The shortest path from any start to any end, by Dijkstra, and the distances of all clusters
    from the starts; those beyond that end are at least its own."""
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
    while before[path[0]] >= 0:
        path.insert(0, int(before[path[0]]))
    return path, distances


def _annealed(
    points: np.ndarray, k: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "C D"], Float[np.ndarray, " C"]]:
    """Initial centres and prices, by deterministic annealing from random rows (Rose 1998, doi
    10.1109/5.726788): clusters of equal mass whose shares of rows sharpen as the temperature
    falls."""
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
    """Indices of the rows that are not zero; of equal rows the first."""
    first: dict[bytes, int] = {}
    for row in np.flatnonzero(np.any(vectors, axis=1)).tolist():
        first.setdefault(vectors[row].tobytes(), row)
    return np.array(list(first.values()), int)


def _distinct(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k random different rows; UserError if there are fewer."""
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
    """Squared distances [C, rows], never negative; float64 for float64 points. The layout makes the
    minimum for each row fast."""
    found = centres @ points.T
    found *= -2
    found += np.einsum("CD,CD->C", centres, centres)[:, None]
    found += np.einsum("ND,ND->N", points, points)
    return np.maximum(found, 0.0, out=found)


def _means(points: np.ndarray, labels: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Mean of each cluster's points; a cluster without points keeps its centre."""
    members = (points[labels == index] for index in range(len(centres)))
    return np.stack([m.mean(axis=0) if len(m) else c for m, c in zip(members, centres)])
