"""Clusters for training in rounds: each finer one lies in exactly one coarser one."""

import itertools

import numpy as np
import pytest

from clustering import control, grouping
from clustering.distances import Distances
from clustering.errors import UserError
from clustering.nested import nested

LANGUAGES = [
    *("ar", "bg", "de", "el", "en", "es", "fr", "hi"),
    *("ja", "ko", "ru", "sw", "tr", "ur", "vi", "zh"),
]


def random_distances(count, seed=0):
    points = np.random.default_rng(seed).normal(size=(count, 3))
    values = np.linalg.norm(points[:, None] - points[None], axis=2)
    tags = tuple(LANGUAGES[:count])
    coverage = np.ones_like(values)
    return Distances(measure="table", languages=tags, values=values, coverage=coverage)


@pytest.mark.parametrize("rule", grouping.RULES)
@pytest.mark.parametrize("counts", [(1, 4, 8), (1, 3, 7), (2, 5, 6, 16)])
def test_each_finer_cluster_lies_in_exactly_one_coarser(rule, counts):
    for seed in range(5):
        clustering = grouping.cluster(random_distances(16, seed), counts[-1], rule=rule)
        levels = nested(clustering, counts)
        assert [len(level) for level in levels] == list(counts)
        assert levels[-1] == clustering.clusters
        for coarse, fine in itertools.pairwise(levels):
            assert sorted(t for tags in coarse.values() for t in tags) == sorted(LANGUAGES)
            for tags in fine.values():
                assert sum(set(tags) <= set(above) for above in coarse.values()) == 1
                assert sum(bool(set(tags) & set(above)) for above in coarse.values()) == 1


def test_near_clusters_join_first_and_equal_ones_stay_equal():
    # Four clusters on a line: en-de next to es-fr, ja-ko next to zh-vi.
    place = {"de": 0, "en": 1, "es": 10, "fr": 11, "ja": 50, "ko": 51, "vi": 60, "zh": 61}
    tags = tuple(place)
    values = np.abs(np.subtract.outer(list(place.values()), list(place.values()))).astype(float)
    found = Distances(measure="table", languages=tags, values=values, coverage=np.ones_like(values))
    levels = nested(grouping.cluster(found, 4), (1, 2, 4))
    assert levels[1] == {
        "de-en-es-fr": ("de", "en", "es", "fr"),
        "ja-ko-vi-zh": ("ja", "ko", "vi", "zh"),
    }
    assert levels[0] == {"de-plus7": tags}


def test_rounds_of_pairs_are_those_that_made_the_clusters():
    # With numbers of clusters that are powers of two, the authors' rounds of pairs are nested.
    distances = random_distances(16, 3)
    levels = nested(grouping.cluster(distances, 8), (2, 4, 8))
    for level, count in zip(levels, (2, 4, 8), strict=True):
        assert set(level.values()) == set(grouping.cluster(distances, count).clusters.values())


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((4,), "two or more ascending numbers of clusters, of which the last is the 4"),
        ((1, 2), "the last is the 4 of the clustering; got 1,2"),
        ((2, 1, 4), "got 2,1,4"),
        ((0, 4), "got 0,4"),
    ],
)
def test_impossible_rounds_are_refused(counts, message):
    clustering = grouping.cluster(random_distances(8), 4)
    with pytest.raises(UserError, match=message):
        nested(clustering, counts)


def test_clusters_without_distances_have_no_rounds():
    with pytest.raises(UserError, match="rounds need clusters of languages with distances"):
        nested(control.random_clusters(LANGUAGES[:8], 4, 0), (2, 4))
