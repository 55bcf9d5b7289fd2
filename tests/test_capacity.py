"""Balanced groups: within bounds, optimally assigned, with no swap or move left that would help."""

from functools import cache
from itertools import permutations, product

import numpy as np
import pytest

from clustering import capacity, grouping, typology
from clustering.agglomerative import join_within
from clustering.capacity import Bounds
from clustering.errors import UserError

PAPER = (
    "ar",
    "bg",
    "de",
    "el",
    "en",
    "es",
    "fr",
    "hi",
    "ja",
    "ko",
    "ru",
    "sw",
    "tr",
    "ur",
    "vi",
    "zh",
)


def random_distances(count, random_seed):
    points = np.random.default_rng(random_seed).normal(size=(count, 3))
    return np.linalg.norm(points[:, None] - points, axis=-1)


def labels_of(languages, found):
    return np.array([next(i for i, g in enumerate(found.groups) if t in g) for t in languages])


@pytest.mark.parametrize("count", [5, 6, 7])
@pytest.mark.parametrize("k", [2, 3])
def test_even_assignment_is_the_cheapest(count, k):
    costs = np.random.default_rng(count * k).random((count, k))
    bounds = capacity.even(count, k)
    found = capacity.assign(costs, np.ones(count), bounds)
    least = min(
        sum(costs[i, group] for i, group in enumerate(labels))
        for labels in product(range(k), repeat=count)
        if all(bounds.least <= labels.count(group) <= bounds.most for group in range(k))
    )
    assert costs[np.arange(count), found].sum() == pytest.approx(least)
    assert set(np.bincount(found, minlength=k)) <= {int(bounds.least), int(bounds.most)}


def test_assignment_by_size_is_the_cheapest():
    draw = np.random.default_rng(0)
    costs, sizes = draw.random((7, 3)), draw.integers(1, 9, 7).astype(float)
    bounds = Bounds(0.0, 1.1 * sizes.sum() / 3)
    found = capacity.assign(costs, sizes, bounds)
    totals = [
        (sum(costs[i, group] for i, group in enumerate(labels)))
        for labels in product(range(3), repeat=7)
        if len(set(labels)) == 3 and np.bincount(labels, sizes).max() <= bounds.most
    ]
    assert costs[np.arange(7), found].sum() == pytest.approx(min(totals))
    assert np.bincount(found, sizes).max() <= bounds.most


def mean_within(distances, labels):
    """Mean over languages of the mean distance to the others of their group; 0 for one alone."""
    same = (labels == labels[:, None]) & ~np.eye(len(labels), dtype=bool)
    sums = np.where(same, distances, 0).sum(axis=1)
    return (sums / np.maximum(same.sum(axis=1), 1)).mean()


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("random_seed", range(4))
def test_no_swap_or_move_is_left_that_would_help(sized, random_seed):
    distances = random_distances(11, random_seed)
    tags = [str(i) for i in range(11)]
    sizes = np.random.default_rng(random_seed).integers(1, 6, 11).astype(float) if sized else None
    weights = np.ones(11) if sizes is None else sizes
    bounds = capacity.even(11, 3) if sizes is None else capacity.at_most(weights, 3)
    labels = labels_of(tags, capacity.balanced(tags, distances, 3, sizes))

    def fits(labels):
        held = np.bincount(labels, weights, minlength=3)
        return held.min() >= max(bounds.least, 1) and held.max() <= bounds.most + 1e-9

    assert fits(labels)
    reached = mean_within(distances, labels)
    for i, j in permutations(range(11), 2):
        swapped = labels.copy()
        swapped[[i, j]] = swapped[[j, i]]
        assert not fits(swapped) or mean_within(distances, swapped) >= reached - 1e-9
    for i, group in product(range(11), range(3)):
        moved = labels.copy()
        moved[i] = group
        assert not fits(moved) or mean_within(distances, moved) >= reached - 1e-9


def test_mean_within_is_the_mean_of_means():
    distances = random_distances(5, 0)
    wanted = np.mean([distances[0, 1], distances[1, 0], 0, distances[3, 4], distances[4, 3]])
    assert mean_within(distances, np.array([0, 0, 1, 2, 2])) == pytest.approx(wanted)


def test_eight_pairs_of_the_paper_are_a_cheapest_matching():
    distances = typology.distances(PAPER).values

    @cache
    def cheapest(paired):
        if paired == (1 << 16) - 1:
            return 0.0
        one = next(i for i in range(16) if not paired >> i & 1)
        return min(
            distances[one, other] + cheapest(paired | 1 << one | 1 << other)
            for other in range(one + 1, 16)
            if not paired >> other & 1
        )

    found = grouping.cluster(typology.distances(PAPER), 8, rule="balanced")
    labels = labels_of(PAPER, grouping.RULES["balanced"](PAPER, distances, 8))
    assert mean_within(distances, labels) * 8 == pytest.approx(cheapest(0))
    assert {len(members) for members in found.clusters.values()} == {2}


def test_tokens_in_balance():
    measured = typology.distances(PAPER)
    tokens = dict.fromkeys(PAPER, 1) | {"en": 6, "de": 3}
    found = grouping.cluster(measured, 4, rule="balanced", sizes=tokens)
    held = {name: sum(tokens[tag] for tag in tags) for name, tags in found.clusters.items()}
    assert max(held.values()) <= 1.25 * sum(tokens.values()) / 4
    assert found.parameters["sizes"] == tokens
    with pytest.raises(UserError, match="sizes go with the rule balanced; got single"):
        grouping.cluster(measured, 4, rule="single", sizes=tokens)
    with pytest.raises(UserError, match="sizes must be above zero for en, sw"):
        grouping.cluster(measured, 4, rule="balanced", sizes=tokens | {"en": 0, "sw": -1})
    with pytest.raises(
        UserError, match=r"3 languages do not go into 2 clusters of at most 11 each"
    ):
        three = measured.of(["en", "de", "fr"])
        grouping.cluster(three, 2, rule="balanced", sizes={"en": 6, "de": 6, "fr": 6})


def test_each_group_is_a_branch_of_the_tree():
    distances = random_distances(6, 1)
    groups = [[0, 3], [1, 4, 5], [2]]
    found = join_within("abcdef", distances, groups)
    assert found.groups == [("a", "d"), ("b", "e", "f"), ("c",)]
    members = [(*merge.members_a, *merge.members_b) for merge in found.merges]
    assert {"".join(sorted(m)) for m in members[:3]} >= {"ad", "bef"}
    first, second = (np.mean(distances[np.ix_(groups[a], groups[b])]) for a, b in ((0, 1), (0, 2)))
    third = np.mean(distances[np.ix_(groups[1], groups[2])])
    assert found.merges[3].distance == pytest.approx(min(first, second, third))
    inside = found.merges[:3]
    assert max(merge.distance for merge in inside) <= distances.max()
