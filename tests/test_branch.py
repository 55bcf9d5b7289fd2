"""Branching: one record for each cluster, once."""

import numpy as np
import pytest

from clustering.clustering import Clustering
from clustering.errors import UserError
from clustering.vectoriser import Vectoriser
from experts.branch import branch
from experts.expert import Expert
from experts.registry import Registry

SEED = Registry(seed_sha256={"model.safetensors": "c" * 64})


def _clusters(**clusters: tuple[str, ...]) -> Clustering:
    languages = tuple(tag for members in clusters.values() for tag in members)
    return Clustering(method="by-hand", clusters=clusters, languages=languages)


def _documents(**documents: dict[str, int]) -> Clustering:
    return Clustering(
        method="by-hand",
        clusters={name: tuple(counts) for name, counts in documents.items()},
        languages=tuple(dict.fromkeys(tag for counts in documents.values() for tag in counts)),
        documents=documents,
        vectoriser=Vectoriser(idf=np.ones(3), projection=np.ones((3, 2))),
        centres=np.zeros((len(documents), 2)),
    )


def test_each_cluster_gets_one_record_in_training_from_the_seed():
    branched = branch(SEED, _clusters(romance=("fr", "es"), slavic=("ru",)))
    assert branched.experts == (
        Expert(
            name="romance", cluster="romance", languages=("fr", "es"), path="experts/romance/v1"
        ),
        Expert(name="slavic", cluster="slavic", languages=("ru",), path="experts/slavic/v1"),
    )
    assert {(e.version, e.parent, e.round, e.status) for e in branched.experts} == {
        (1, "seed", 1, "training")
    }
    assert SEED.experts == ()


def test_branching_again_on_the_same_clusters_changes_nothing():
    branched = branch(SEED, _clusters(romance=("fr", "es"), slavic=("ru",)))
    assert branch(branched, _clusters(slavic=("ru",), romance=("es", "fr"))) is branched


def test_branching_again_later_changes_nothing():
    """New versions and grown experts are no other clusters."""
    later = branch(SEED, _clusters(slavic=("ru",)))
    later = later.publish("slavic", 1, sha256={"x": "a" * 64}, tokens=1).start("slavic")
    later = later.add(Expert(name="pl", languages=("pl",), parent="slavic@v1", round=2))
    assert branch(later, _clusters(slavic=("ru",))) is later


def test_a_cluster_has_no_language_that_an_adopted_expert_serves():
    adopted = SEED.add(
        Expert(name="polish", languages=("pl",), status="published", sha256={"x": "a" * 64})
    )
    with pytest.raises(UserError, match=r"'pl' of the cluster slavic is held by polish@v1"):
        branch(adopted, _clusters(romance=("fr", "es"), slavic=("ru", "pl")))
    assert len(branch(adopted, _clusters(slavic=("ru", "cs"))).experts) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"romance": ("fr",), "slavic": ("ru", "es")},
        {"romance": ("fr", "es")},
        {"latin": ("fr", "es"), "slavic": ("ru",)},
    ],
)
def test_branching_on_other_clusters_is_refused(other):
    branched = branch(SEED, _clusters(romance=("fr", "es"), slavic=("ru",)))
    with pytest.raises(
        UserError, match=r"branched on other clusters: romance \(fr es\), slavic \(ru\);"
    ):
        branch(branched, _clusters(**other))


def test_every_language_of_document_clusters_is_served_once_where_it_has_most_documents():
    branched = branch(SEED, _documents(c0={"en": 9, "es": 2}, c1={"es": 7, "en": 1}, c2={"en": 3}))
    assert [(e.name, e.languages, e.documents) for e in branched.experts] == [
        ("c0", ("en",), {"en": 9, "es": 2}),
        ("c1", ("es",), {"es": 7, "en": 1}),
        ("c2", (), {"en": 3}),
    ]


def test_other_document_clusters_are_told_apart_by_their_documents():
    branched = branch(SEED, _documents(c0={"en": 9}, c1={"es": 7}))
    assert branch(branched, _documents(c0={"en": 9}, c1={"es": 7})) is branched
    with pytest.raises(UserError, match="other clusters"):
        branch(branched, _documents(c0={"en": 8}, c1={"es": 7}))


def test_a_cluster_that_cannot_name_an_expert_is_refused():
    with pytest.raises(UserError, match="'dense' cannot name an expert"):
        branch(SEED, _clusters(dense=("en",)))
