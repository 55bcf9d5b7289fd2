"""Balanced k-means respects the bound, assigns at the least cost, and repeats itself."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from clustering import kmeans
from clustering.errors import UserError


def blobs(rows, weights, spread, seed=0):
    """Unit vectors around len(weights) orthogonal centres, and the centre of each."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(weights), rows, p=weights)
    centres = np.linalg.qr(rng.normal(size=(20, 20)))[0][: len(weights)]
    points = centres[labels] + spread * rng.normal(size=(rows, 20))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), labels


def assign_balanced(costs, capacity):
    """Labels at the least of costs [rows, clusters]."""
    start = np.zeros(costs.shape[1])
    return kmeans.assign_balanced(np.ascontiguousarray(costs.T), capacity, start)[0]


@pytest.mark.parametrize("rows", [60, 301])
@pytest.mark.parametrize("clusters", [1, 2, 7])
@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("more", [0, 15])
def test_balanced_assignment_is_of_the_least_cost(rows, clusters, spread, more):
    points, _ = blobs(rows, [0.7, 0.1, 0.1, 0.1], spread)
    centres = points[np.random.default_rng(1).choice(rows, clusters, replace=False)]
    costs = ((points[:, None] - centres[None]) ** 2).sum(axis=2).astype(np.float64)
    capacity = -(-rows // clusters) + more
    labels = assign_balanced(costs, capacity)
    assert np.bincount(labels).max() <= capacity
    row, place = linear_sum_assignment(np.repeat(costs, capacity, axis=1))
    least = costs[row, place // capacity].sum()
    assert costs[np.arange(rows), labels].sum() == pytest.approx(least, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_costs_of_any_size_are_assigned_alike(scale):
    costs = np.random.default_rng(0).normal(size=(90, 5))
    wanted = assign_balanced(costs, 18)
    np.testing.assert_array_equal(assign_balanced(scale * costs, 18), wanted)


def test_an_assignment_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="2 clusters of at most 3 rows cannot have 7 rows"):
        assign_balanced(np.zeros((7, 2)), 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_refused(bad):
    points, _ = blobs(30, [1.0], 0.3)
    points[3, 2] = bad
    with pytest.raises(ValueError, match="vectors must be finite"):
        kmeans.fit(points, 3, 0)
    with pytest.raises(ValueError, match="costs must be finite"):
        assign_balanced(np.array([[0.0, bad], [1.0, 1.0]]), 1)


@pytest.fixture
def paths(monkeypatch):
    """Every path along which rows are moved."""
    found, shortest = [], kmeans._shortest_path
    monkeypatch.setattr(
        kmeans, "_shortest_path", lambda *given: found.append(shortest(*given)) or found[-1]
    )
    return found


def test_what_a_row_costs_anywhere_decides_nothing(paths):
    draw = np.random.default_rng(0)
    costs = draw.integers(0, 2**20, size=(4000, 8)) / 2**20  # of which the sum loses no bit
    costs[:, 0] /= 4
    far = costs + 2.0 ** draw.integers(20, 30, size=(4000, 1))
    wanted = assign_balanced(costs, 500)
    moved = len(paths)
    np.testing.assert_array_equal(assign_balanced(far, 500), wanted)
    assert len(paths) == 2 * moved < 200  # prices are as good as without


@pytest.mark.parametrize("random_seed", range(12))
def test_a_point_far_from_all_does_not_hang(random_seed):
    draw = np.random.default_rng(random_seed)
    points = draw.normal(size=(int(draw.integers(30, 300)), 3))
    points[0] *= 1e5
    fitted = kmeans.fit(points, int(draw.integers(2, 12)), 0)
    assert max(fitted.sizes) <= -(-len(points) // len(fitted.sizes))


def test_equal_rows_move_together(paths):
    points, _ = blobs(4000, [0.25] * 4, 0.3)
    points[:2000] = points[0]
    costs = ((points[:, None] - points[None, -8:]) ** 2).sum(axis=2).astype(np.float64)
    labels = assign_balanced(costs, 500)
    assert np.bincount(labels).tolist() == [500] * 8
    assert 0 < len(paths) < 400  # and not one for each of the 1,500 that must go elsewhere


def test_equal_costs_fill_every_cluster():
    labels = assign_balanced(np.ones((12, 3)), 4)
    assert np.bincount(labels).tolist() == [4, 4, 4]


@pytest.mark.parametrize(("rows", "k"), [(500, 8), (503, 8), (40, 40), (41, 1)])
def test_sizes_are_bounded_while_fitting(rows, k):
    points, _ = blobs(rows, [0.6, 0.2, 0.1, 0.1], 0.3)
    fitted = kmeans.fit(points, k, random_seed=0)
    assert sum(fitted.sizes) == rows
    assert max(fitted.sizes) <= -(-rows // k)
    assert 1 <= max(fitted.sizes) * k / len(fitted.rows) <= 1 + k / rows
    distances = ((points - fitted.centres[fitted.labels]) ** 2).sum(axis=1)
    assert fitted.inertia == pytest.approx(distances.mean(), rel=1e-5)


def test_equal_blobs_are_found():
    points, labels = blobs(800, [0.25] * 4, 0.05)
    fitted = kmeans.fit(points, 4, random_seed=0)
    found = kmeans.assign(points, fitted.centres)
    table = np.zeros((4, 4), int)
    np.add.at(table, (found, labels), 1)
    assert (table > 0).sum() == 4  # each cluster is one blob


def test_the_same_seed_gives_the_same_fit_and_the_argument_is_not_changed():
    points, _ = blobs(300, [0.5, 0.5], 0.3)
    before = points.copy()
    first, second = (kmeans.fit(points, 5, random_seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.centres, second.centres)
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(first.rows, second.rows)
    np.testing.assert_array_equal(points, before)
    assert len(first.rows) == 300


def test_assignment_is_to_the_nearest_centre():
    points, _ = blobs(200, [0.7, 0.3], 0.3)
    centres = kmeans.fit(points, 3, random_seed=0).centres
    wanted = [np.argmin([np.linalg.norm(point - centre) for centre in centres]) for point in points]
    assert kmeans.assign(points, centres).tolist() == wanted
    assert kmeans.assign(points[:0], centres).tolist() == []


def test_empty_documents_are_left_out_and_too_few_distinct_ones_refused():
    points = np.zeros((6, 3), np.float32)
    points[1], points[4] = [1, 0, 0], [0, 1, 0]
    assert kmeans.fit(points, 2, random_seed=0).rows.tolist() == [1, 4]
    with pytest.raises(UserError, match="between 1 and 2 different documents that are not empty"):
        kmeans.fit(points, 3, random_seed=0)
    with pytest.raises(UserError, match="between 1 and 1 different documents"):
        kmeans.fit(np.ones((5, 3), np.float32), 2, random_seed=0)


def test_equal_documents_count_once():
    few, _ = blobs(12, [0.5, 0.5], 0.5)
    many = np.repeat(few, [300, 250] + [6] * 10, axis=0)
    once, again = kmeans.fit(few, 8, random_seed=0), kmeans.fit(many, 8, random_seed=0)
    np.testing.assert_array_equal(once.centres, again.centres)
    assert again.rows.tolist() == [0, 300, *range(550, 610, 6)]
    # Every cluster has documents, wherever they are nearest to its centre.
    assert np.bincount(kmeans.assign(many, again.centres), minlength=8).all()
