"""A Clustering is checked when made, equal after saving, and readable."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import clustering
import experts
from clustering import control, files, tfidf, typology
from clustering.clustering import Clustering
from clustering.documents import Documents
from clustering.errors import UserError
from clustering.names import name_clusters

LANGUAGES = ["en", "fr", "es", "de", "el", "bg", "ru", "tr"]


def of_documents():
    rng = np.random.default_rng(0)
    documents = [rng.integers(10 * (i % 3), 10 * (i % 3) + 12, 30) for i in range(60)]
    languages = ["en" if i % 3 < 2 else "sw" for i in range(60)]
    fitted = tfidf.fit(documents, 40, dimensions=5)
    return tfidf.cluster(
        Documents([list(zip(documents, languages))]),
        fitted,
        3,
        made_from={"en.jsonl": "ab" * 32},
    )


EXAMPLES = {
    "pairs": lambda: typology.cluster([*LANGUAGES, "nn"], 3, exclude=["nn"]),
    "average": lambda: typology.cluster(LANGUAGES, 3, rule="average"),
    "random": lambda: control.random_clusters(LANGUAGES, 3, random_seed=1),
    "by hand": lambda: control.by_hand({"română": ["ro"], "rest": ["sr-Latn", "pt-PT"]}, ["tr"]),
    "documents": of_documents,
}


@pytest.mark.parametrize("make", EXAMPLES.values(), ids=EXAMPLES)
def test_a_saved_clustering_loads_equal(make, tmp_path):
    clustering = make()
    clustering.save(tmp_path / "clusters")
    assert Clustering.load(tmp_path / "clusters") == clustering
    assert make() == clustering


def test_equality_sees_every_field():
    clustering = EXAMPLES["documents"]()
    changes = {
        "method": "other",
        "parameters": {},
        "made_from": {},
        "unassigned": ("tr",),
        "centres": clustering.centres + 1,
        "vectoriser": dataclasses.replace(clustering.vectoriser, idf=clustering.vectoriser.idf + 1),
    }
    for name, value in changes.items():
        assert dataclasses.replace(clustering, **{name: value}) != clustering
    tree = EXAMPLES["pairs"]()
    nearer = dataclasses.replace(tree.distances, values=tree.distances.values / 2)
    assert dataclasses.replace(tree, distances=nearer) != tree
    assert dataclasses.replace(tree, merges=None) != tree
    turned = dict(reversed(tree.clusters.items()))
    assert dataclasses.replace(tree, clusters=turned) != tree


def test_the_json_has_the_keys_that_others_rely_on(tmp_path):
    clustering = EXAMPLES["pairs"]()
    clustering.save(tmp_path)
    value = json.loads((tmp_path / "clusters.json").read_text(encoding="utf-8"))
    assert value["format"] == 1
    assert value["method"] == "typology"
    assert value["parameters"]["k"] == 3
    assert value["clusters"] == {name: list(group) for name, group in clustering.clusters.items()}
    assert value["unassigned"] == ["nn"]
    assert value["languages"] == LANGUAGES
    facts = value["distances"]
    assert (facts["file"], facts["array"]) == ("clusters.npz", "distances")
    assert (facts["measure"], facts["coverage"]) == ("typology", "coverage")
    assert value["made_from"]["feature_averages.npz"]
    with np.load(tmp_path / "clusters.npz") as arrays:
        np.testing.assert_array_equal(arrays["distances"], clustering.distances.values)
        np.testing.assert_array_equal(arrays["coverage"], clustering.distances.coverage)


def test_nothing_is_overwritten_unasked(tmp_path):
    first, second = EXAMPLES["pairs"](), EXAMPLES["random"]()
    first.save(tmp_path)
    with pytest.raises(UserError, match=r"clusters\.json exists already"):
        second.save(tmp_path)
    assert Clustering.load(tmp_path) == first
    second.save(tmp_path, overwrite=True)
    assert Clustering.load(tmp_path) == second
    assert os.listdir(tmp_path) == ["clusters.json"]


def test_files_of_two_clusterings_are_not_mixed(tmp_path, monkeypatch):
    EXAMPLES["pairs"]().save(tmp_path)

    def crash(path, value):
        raise RuntimeError("killed")

    monkeypatch.setattr(files, "write_json", crash)
    with pytest.raises(RuntimeError):
        typology.cluster(["en", "de"], 1).save(tmp_path, overwrite=True)
    with pytest.raises(UserError, match=r"clusters\.npz is not the file that"):
        Clustering.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "is of format 2"),
        ({"clusters": {"../../home": ["en"]}, "languages": ["en"]}, "cluster names must"),
        ({"clusters": {"a": ["en"], "b": ["en"]}, "languages": ["en"]}, "en is in several"),
        ({"clusters": None}, "json is damaged"),
        ({"merges": [{}]}, "json is damaged"),
        ({"arrays": True}, "json is damaged"),
        ({"languages": ["en", "fr"]}, "no cluster|not listed"),
    ],
)
def test_a_damaged_file_is_refused(change, message, tmp_path):
    EXAMPLES["random"]().save(tmp_path)
    path = tmp_path / "clusters.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        Clustering.load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clusters": {}}, "at least one cluster"),
        ({"clusters": {"a": ("en", "es"), "b": ("en",)}}, "en is in several clusters"),
        ({"clusters": {"a": ("en",)}}, "es is in no cluster"),
        ({"clusters": {"a": ("en", "es", "de")}}, "de is not listed"),
        ({"clusters": {"a": ("en", "es"), "b": ()}}, "b is empty"),
        ({"unassigned": ("es",)}, "es is both unassigned and in a cluster"),
        ({"clusters": {"a": ("en",), "A": ("es",)}}, "differ in more than case"),
        ({"clusters": {".a": ("en", "es")}}, "begin with a letter or digit"),
        ({"clusters": {"a/b": ("en", "es")}}, "cluster names must"),
    ],
)
def test_no_language_is_lost_or_doubled(fields, message):
    valid = {"method": "by-hand", "clusters": {"a": ("en", "es")}, "languages": ("en", "es")}
    Clustering(**valid)
    with pytest.raises(UserError, match=message):
        Clustering(**(valid | fields))


def test_clusters_of_documents_have_the_languages_of_their_documents():
    clustering = EXAMPLES["documents"]()
    counts = clustering.documents
    for documents in (counts | {"c1": {"de": 1}}, {"c0": counts["c0"]}, counts | {"c9": {}}, {}):
        with pytest.raises(UserError, match=r"c[0-9] has documents in other languages"):
            dataclasses.replace(clustering, documents=documents)


def test_arrays_must_fit():
    tree, documents = EXAMPLES["pairs"](), EXAMPLES["documents"]()
    with pytest.raises(ValueError, match="distances must be of the languages, in their order"):
        dataclasses.replace(tree, distances=tree.distances.of(tree.languages[::-1]))
    with pytest.raises(ValueError, match="has 7 merges; got 6"):
        dataclasses.replace(tree, merges=tree.merges[1:])
    with pytest.raises(ValueError, match="come together"):
        dataclasses.replace(documents, centres=None)
    with pytest.raises(ValueError, match=r"centres must be \[3, 5\]"):
        dataclasses.replace(documents, centres=documents.centres[:, :1])
    with pytest.raises(ValueError, match="JSON values"):
        dataclasses.replace(tree, parameters={"a": (1, 2)})


def test_cluster_of_takes_any_code_of_the_language():
    clustering = control.by_hand({"east": ["sw", "he"], "west": ["en"]}, unassigned=["tr"])
    assert clustering.cluster_of("swh") == "east"
    assert clustering.cluster_of("iw") == "east"
    with pytest.raises(UserError, match="tr is unassigned"):
        clustering.cluster_of("tr")
    with pytest.raises(UserError, match=r"de is not among the languages .* sw, he, en"):
        clustering.cluster_of("de")
    with pytest.raises(ValueError, match="use cluster_of"):
        clustering.assign(np.zeros((1, 3)))


def test_a_language_of_documents_belongs_where_most_of_its_documents_are():
    documents = {"c0": {"en": 5, "sw": 3}, "c1": {"sw": 4}, "c2": {"sw": 1, "en": 1}}
    clustering = dataclasses.replace(
        EXAMPLES["documents"](),
        clusters={name: tuple(counts) for name, counts in documents.items()},
        documents=documents,
    )
    assert clustering.cluster_of("sw") == "c1"
    assert clustering.cluster_of("en") == "c0"
    assert clustering.shares["c0"] == {"en": 5 / 8, "sw": 3 / 8}


def test_names_say_what_is_inside_and_are_good_folders():
    assert name_clusters([("en", "es")]) == {"en-es": ("en", "es")}
    assert list(name_clusters([("a", "b", "c", "d"), tuple("efghi")])) == ["a-b-c-d", "e-plus4"]
    assert list(name_clusters([("pt-BR",), ("pt", "br")])) == ["pt-BR", "pt-br_2"]
    many = ("ace-Arab", "ace", "bug", *"abcdefghi")
    assert list(name_clusters([many, ("az-Arab", "bjn-Arab", "kas-Deva")])) == [
        "ace-Arab-plus11",
        "az-Arab-plus2",
    ]


@pytest.mark.parametrize("name", EXAMPLES)
def test_renamed_clusters_are_the_same_ones(name):
    clustering = EXAMPLES[name]()
    first = next(iter(clustering.clusters))
    renamed = clustering.renamed({first: "elsewhere"})
    assert list(renamed.clusters.values()) == list(clustering.clusters.values())
    assert next(iter(renamed.clusters)) == "elsewhere" and renamed.shares == (
        clustering.shares
        and {{first: "elsewhere"}.get(n, n): s for n, s in clustering.shares.items()}
    )
    assert renamed.renamed({"elsewhere": first}) == clustering
    with pytest.raises(UserError, match=f"no cluster nowhere; there are {first}"):
        clustering.renamed({"nowhere": "x"})
    with pytest.raises(UserError, match="names must consist of letters"):
        clustering.renamed({first: "../x"})
    with pytest.raises(UserError, match="differ in more than case"):
        clustering.renamed({first: list(clustering.clusters)[1].upper()})


def test_clusters_are_renamed_from_the_command_line(xelm, tmp_path, undrawn):
    xelm("cluster", "-k", 2, "--languages", "en,de,ja,ko", "--out", tmp_path / "out")
    before = Clustering.load(tmp_path / "out")
    old = before.cluster_of("ja")
    done = xelm("rename", tmp_path / "out", f"{old}=far-east")
    assert done.code == 0 and "far-east" in done.out, done.err
    assert Clustering.load(tmp_path / "out") == before.renamed({old: "far-east"})
    for names, said in (
        (["far-east=größe"], "'größe' cannot name an expert"),
        (["far-east=Dense"], "names another system of a RUN"),
        (["far-east"], "OLD=NEW wanted, such as en-plus7=germanic; got far-east"),
        (["far-east=a", "far-east=b"], "a cluster or an expert is renamed twice"),
        (["near=a"], "no cluster near; there are"),
    ):
        refused = xelm("rename", tmp_path / "out", *names)
        assert (refused.code, refused.out) == (2, "") and said in refused.err
    assert Clustering.load(tmp_path / "out") == before.renamed({old: "far-east"})


@pytest.mark.parametrize("k", [1, 3, 8])
def test_random_clusters_are_even_and_decided_by_the_seed(k):
    first = control.random_clusters(LANGUAGES, k, random_seed=0)
    sizes = [len(members) for members in first.clusters.values()]
    assert len(sizes) == k
    assert max(sizes) - min(sizes) <= 1
    assert first == control.random_clusters(LANGUAGES, k, random_seed=0)
    others = [control.random_clusters(LANGUAGES, 3, random_seed=seed).clusters for seed in range(5)]
    assert len({str(clusters) for clusters in others}) > 1
    with pytest.raises(UserError, match="between 1 and 8 languages; got 9"):
        control.random_clusters(LANGUAGES, 9, random_seed=0)


def test_a_language_in_two_groups_by_hand_is_refused():
    with pytest.raises(UserError, match=r"sw \(as sw, swh\)"):
        control.by_hand({"a": ["sw"], "b": ["swh"]})


def test_a_clustering_prints_as_a_table():
    assert str(EXAMPLES["by hand"]()) == (
        "by-hand: 3 languages, 2 clusters of languages\n"
        "  română  Romanian\n"
        "  rest    Serbian (Latin), Portuguese (Portugal)\n"
        "  unassigned: Turkish"
    )
    lines = str(EXAMPLES["documents"]()).splitlines()
    assert lines[0] == "tfidf: 2 languages, 3 clusters of documents"
    assert sorted(lines[1:])[0].startswith("  c0  20 documents: ")
    assert sum("sw 100%" in line for line in lines) == 1


def test_the_repr_of_a_clustering_is_one_line():
    assert repr(EXAMPLES["by hand"]()) == (
        "<Clustering by-hand: 3 languages, 2 clusters of languages: română, rest>"
    )
    assert repr(EXAMPLES["documents"]()) == (
        "<Clustering tfidf: 2 languages, 3 clusters of documents: c0, c1, c2>"
    )
    assert repr(control.random_clusters(LANGUAGES, 8, 0)) == (
        "<Clustering random: 8 languages, 8 clusters of languages: en, fr, es, de, el, bg, 2 more>"
    )


def test_help_shows_the_interface():
    for package in (clustering, experts):
        assert package.__doc__ is not None
        assert dir(package) == package.__all__ == sorted(package.__all__)
        for name in package.__all__:
            assert importlib.import_module(f"{package.__name__}.{name}").__doc__
            assert re.search(rf"^    .*\b{name}\b", package.__doc__, re.MULTILINE), name


def test_importing_loads_nothing_heavy():
    code = """
import sys, clustering
assert "numpy" not in sys.modules
from clustering import typology, tfidf, control, figures, maps
heavy = {"jax", "flax", "torch", "scipy", "sklearn", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
typology.cluster(["en", "es", "de", "el"], 2)
heavy = {"jax", "flax", "torch", "scipy", "sklearn", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=os.path.dirname(os.path.dirname(__file__))
    )
