"""The experiments on real text divide the languages as they say."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import reproduce
import systems


@pytest.mark.parametrize("system", [s for s in reproduce.SYSTEMS if not s.startswith("tfidf")])
def test_every_system_has_every_language_once(system):
    clusters = systems.clusters_of(None, system, repetition=0).clusters
    members = [tag for tags in clusters.values() for tag in tags]
    assert sorted(members) == sorted(systems.LANGUAGES)
    assert len(clusters) == int(system.rpartition("-k")[2])


def test_every_system_has_settings_that_are_searched_for():
    kinds = {systems.kind_of(system) for system in ("dense", *reproduce.SYSTEMS)}
    assert kinds == set(reproduce.TUNED)
    assert all(systems.kind_of(system) == kind for kind, system in reproduce.TUNED.items())


def test_random_clusters_differ_between_repetitions():
    first, second = (systems.clusters_of(None, "random-k8", r).clusters for r in (0, 1))
    assert set(first.values()) != set(second.values())
