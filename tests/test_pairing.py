"""Every rule gives exactly k groups for any n and k, and loses no language; pairs are even."""

import re

import numpy as np
import pytest
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from clustering import grouping, pairing
from clustering.distances import Distances
from clustering.errors import UserError
from clustering.tree import linkage_matrix


def random_distances(n, seed):
    points = np.random.default_rng(seed).normal(size=(n, 3))
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def letters(n):
    return [chr(ord("a") + i) for i in range(n)]


def authors_rounds(distances, k):
    """The authors' loop, for k * 2^r languages."""
    groups = [[i] for i in range(len(distances))]
    while len(groups) > k:
        pairs = sorted(
            (min(distances[x, y] for x in groups[i] for y in groups[j]), i, j)
            for i in range(len(groups))
            for j in range(i + 1, len(groups))
        )
        merged = []
        while pairs:
            _, i, j = pairs[0]
            merged.append(groups[i] + groups[j])
            pairs = [pair for pair in pairs if not {i, j} & {*pair[1:]}]
        groups = merged
    return {frozenset(group) for group in groups}


ALL = [(n, k) for n in range(1, 14) for k in range(1, n + 1)]


@pytest.mark.parametrize("rule", grouping.RULES.values(), ids=grouping.RULES)
@pytest.mark.parametrize("seed", [0, 1])
def test_any_n_and_k_give_a_partition_into_exactly_k(rule, seed):
    for n, k in ALL:
        groups = rule(letters(n), random_distances(n, seed), k).groups
        assert len(groups) == k
        assert sorted(name for group in groups for name in group) == letters(n)
        assert all(list(group) == sorted(group) for group in groups)
        assert groups == sorted(groups)


@pytest.mark.parametrize("seed", range(4))
def test_sizes_of_pairs_differ_by_at_most_one(seed):
    for n, k in [*ALL, (23, 5), (40, 9), (31, 3)]:
        sizes = [
            len(group)
            for group in pairing.pairs(
                [str(i) for i in range(n)], random_distances(n, seed), k
            ).groups
        ]
        assert max(sizes) - min(sizes) <= 1, (n, k, sizes)


@pytest.mark.parametrize(("n", "k"), [(16, 8), (16, 4), (16, 2), (16, 1), (12, 3), (10, 5), (8, 1)])
def test_powers_of_two_are_the_authors_rounds(n, k):
    for seed in range(10):
        distances = random_distances(n, seed)
        groups = pairing.pairs([str(i) for i in range(n)], distances, k).groups
        assert {frozenset(map(int, group)) for group in groups} == authors_rounds(distances, k)
        tied = np.ceil(distances)
        groups = pairing.pairs([str(i) for i in range(n)], tied, k).groups
        assert {frozenset(map(int, group)) for group in groups} == authors_rounds(tied, k)


@pytest.mark.parametrize("linkage", ["single", "average", "complete"])
@pytest.mark.parametrize("seed", range(3))
def test_agglomerative_groups_are_scipys_tree_cut_at_k(linkage, seed):
    n = 13
    distances = random_distances(n, seed)
    tree = hierarchy.linkage(squareform(distances), linkage)
    for k in range(1, n + 1):
        labels = hierarchy.cut_tree(tree, k)[:, 0]
        wanted = {frozenset(np.flatnonzero(labels == label).tolist()) for label in range(k)}
        found = grouping.RULES[linkage]([str(i) for i in range(n)], distances, k)
        assert {frozenset(map(int, group)) for group in found.groups} == wanted
    whole = grouping.RULES[linkage]([str(i) for i in range(n)], distances, 1)
    np.testing.assert_allclose([merge.distance for merge in whole.merges], tree[:, 2])


@pytest.mark.parametrize("rule", grouping.RULES.values(), ids=grouping.RULES)
def test_the_first_merges_make_the_groups_and_all_make_one(rule):
    for n, k in ALL:
        found = rule(letters(n), random_distances(n, 3), k)
        groups = {(letter,) for letter in letters(n)}
        assert len(found.merges) == n - 1
        for step, merge in enumerate(found.merges):
            if step == n - k:
                assert groups == set(found.groups)
            groups -= {merge.members_a, merge.members_b}
            groups.add(tuple(sorted(merge.members_a + merge.members_b)))
        assert groups == {tuple(letters(n))}


def test_a_merge_distance_is_that_of_the_closest_two():
    names = letters(9)
    distances = random_distances(9, 5)
    for merge in pairing.pairs(names, distances, 2).merges:
        a = [names.index(name) for name in merge.members_a]
        b = [names.index(name) for name in merge.members_b]
        assert merge.distance == distances[np.ix_(a, b)].min()


@pytest.mark.parametrize("gap", [0.0, 0.1])
def test_the_linkage_matrix_is_a_tree_that_scipy_accepts(gap):
    for n, k in ALL[1:]:
        found = pairing.pairs(letters(n), random_distances(n, 6), k)
        tree = linkage_matrix(letters(n), found.merges, gap)
        if n > 1:
            assert hierarchy.is_valid_linkage(tree)
            heights = [0.0] * n + tree[:, 2].tolist()
            for a, b, height, _ in tree:
                below = [heights[int(side)] + gap for side in (a, b) if side >= n]
                assert height >= max(below, default=0.0)
            assert tree[-1, 3] == n
            assert (tree[:, 2] >= [merge.distance for merge in found.merges]).all()


def test_k_out_of_range_and_unknown_rules_are_refused():
    tags = ("en", "de", "fr")
    measured = Distances(
        measure="a test",
        languages=tags,
        values=random_distances(3, 0),
        coverage=np.ones((3, 3)),
    )
    for k in (0, 4, -1):
        with pytest.raises(UserError, match=f"k must be between 1 and 3 languages; got {k}"):
            grouping.cluster(measured, k)
    with pytest.raises(UserError, match="unknown rule 'ward'; there are pairs, single, average"):
        grouping.cluster(measured, 2, rule="ward")


def test_the_command_line_offers_every_rule(xelm):
    explained = " ".join(xelm("cluster", "--help").out.split())
    explained = explained.partition("--rule RULE how languages are grouped: ")[2].partition(" --")[
        0
    ]
    assert set(re.findall(r"\w+", explained)) >= set(grouping.RULES)


def test_an_unknown_rule_is_refused_before_a_corpus_is_read(xelm, tmp_path):
    found = xelm(
        *("cluster", "-k", 2, "--rule", "ward", "--method", "words"),
        *("--corpus", tmp_path / "nowhere", "--out", tmp_path / "out"),
    )
    assert (found.code, found.err) == (
        2,
        "xelm: unknown rule 'ward'; there are pairs, single, average, complete, balanced\n",
    )
