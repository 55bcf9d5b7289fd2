"""Distances by name from whatever a user has, clusters of them, and relatives."""

import gzip
import json
import shutil

import numpy as np
import pytest
from shared import LANGUAGES, documents_of

from clustering import choice, distances, genealogy, lexical, table, typology
from clustering.clustering import Clustering
from clustering.errors import UserError
from xelm.data import conllu
from xelm.runs.distances import Sources, measured
from xelm.runs.measures import MEASURES
from xelm.runs.run import open_run

CONLLU = """# sent_id = 1
1\tNew\tNew\tPROPN\t_\t_\t0\troot\t_\t_
2\tYork\tYork\tPROPN\t_\t_\t1\tflat\t_\t_
3-4\tzum\t_\t_\t_\t_\t_\t_\t_\t_
3\tzu\tzu\tADP\t_\t_\t1\tcase\t_\t_
4\tAnna\tAnna\tPROPN\t_\t_\t1\tnmod\t_\t_

1\tAnna\tAnna\tPROPN\t_\t_\t0\troot\t_\t_
"""


@pytest.fixture
def tagged_text(tmp_path):
    folder = tmp_path / "tagged"
    folder.mkdir()
    (folder / "deu.conllu").write_text(CONLLU)
    text = CONLLU.replace("New", "Old").encode()
    (folder / "en.conllu.gz").write_bytes(gzip.compress(text))
    return folder


def test_a_measure_alone_is_what_clustering_has():
    tags, only = ["en", "de", "ja"], ["S_SVO", "S_SOV"]
    found = measured("typology", tags, Sources(features="syntax_knn", only=only))
    assert found == typology.distances(tags, "syntax_knn", only)


def test_measures_are_weighed():
    found = measured("typology:3 + genealogy", LANGUAGES, Sources())
    parts = [(typology.distances(LANGUAGES), 3.0), (genealogy.distances(LANGUAGES), 1.0)]
    assert found == distances.combine(parts)


def test_text_of_a_corpus_or_of_a_run(tiny):
    run = open_run(tiny.directory)
    documents = {tag: documents_of(tiny.corpus, tag) for tag in LANGUAGES}
    for measure in ("words", "characters"):
        count = getattr(lexical, measure)
        wanted = lexical.text_distances({t: count(documents[t]) for t in LANGUAGES}, measure)
        for sources in (Sources(corpus=tiny.corpus), Sources(run=run)):
            found = measured(measure, LANGUAGES, sources)
            np.testing.assert_array_equal(found.values, wanted.values)
    few = measured("words", LANGUAGES, Sources(corpus=tiny.corpus, documents=3))
    wanted = lexical.text_distances(
        {t: lexical.words(documents[t][:3]) for t in LANGUAGES}, "words"
    )
    np.testing.assert_array_equal(few.values, wanted.values)
    assert few.parameters["most_documents"] == 3


def test_subwords_of_a_run(tiny):
    run = open_run(tiny.directory)
    tokenizer = run.tokenizer()
    ids = {t: map(np.array, tokenizer.encode(documents_of(tiny.corpus, t))) for t in LANGUAGES}
    wanted = lexical.text_distances({t: lexical.subwords(ids[t]) for t in LANGUAGES}, "subwords")
    found = measured("subwords", None, Sources(run=run))
    np.testing.assert_array_equal(found.values, wanted.values)


def test_names_of_tagged_text(tagged_text):
    files = conllu.files(tagged_text)
    assert [list(conllu.proper_nouns(files[tag])) for tag in ("de", "en")] == [
        ["New York", "Anna", "Anna"],
        ["Old York", "Anna", "Anna"],
    ]
    found = measured("names", None, Sources(tagged=tagged_text))
    assert found.languages == ("de", "en")
    assert found.between("de", "en") == pytest.approx(1 - 1 / 3)
    assert set(found.made_from) == {"deu.conllu", "en.conllu.gz"}


def test_every_file_of_tagged_text_in_a_language_is_read(tagged_text):
    (tagged_text / "de.CONLLU").write_text("\ufeff" + CONLLU.replace("New", "Neu"))
    (tagged_text / "._de.conllu").write_bytes(b"\0\5")
    files = conllu.files(tagged_text)
    assert [path.name for path in files["de"]] == ["de.CONLLU", "deu.conllu"]
    names = list(conllu.proper_nouns(files["de"]))
    assert names == ["Neu York", "Anna", "Anna", "New York", "Anna", "Anna"]
    (tagged_text / "notes.conllu").write_text(CONLLU)
    with pytest.raises(UserError, match=r"notes\.conllu: unknown language code 'notes'"):
        conllu.files(tagged_text)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"1\tNew\tNew\tPROPN\n", r"de.conllu:1: ten columns of CoNLL-U wanted"),
        (b"# ok\n\xff\n", r"de.conllu is damaged: .*codec"),
    ],
)
def test_what_is_wrong_with_tagged_text_is_said(tmp_path, content, said):
    (tmp_path / "de.conllu").write_bytes(content)
    with pytest.raises(UserError, match=said):
        measured("names", None, Sources(tagged=tmp_path))


def test_tagged_text_that_was_cut_short(tmp_path):
    (tmp_path / "de.conllu.gz").write_bytes(gzip.compress(CONLLU.encode() * 99)[:-9])
    with pytest.raises(UserError, match=r"de.conllu.gz is damaged"):
        measured("names", None, Sources(tagged=tmp_path))


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_that_is_offered_measures_or_names_the_option_that_it_needs(measure):
    without_data = {"mixture", "typology", "genealogy", "geography"}
    if measure in without_data:
        assert measured(measure, ["en", "de"], Sources()).languages == ("en", "de")
    else:
        with pytest.raises(UserError, match=f"the measure {measure} needs --"):
            measured(measure, ["en", "de"], Sources())


def test_clusters_by_measures_from_the_command_line(xelm, tiny, tmp_path):
    (tmp_path / "traits.csv").write_text("l,a,b\nen,0,1\nde,0,2\nes,5,1\nfr,5,3\n")
    found = xelm(
        *("cluster", "--method", "table:3+subwords", "--table", tmp_path / "traits.csv"),
        *("--run", tiny.directory, "-k", 2, "--rule", "average", "--out", tmp_path / "out"),
    )
    assert found.code == 0, found.err
    saved = Clustering.load(tmp_path / "out")
    assert set(saved.clusters.values()) == {("en", "de"), ("es", "fr")}
    assert saved.method == "0.75 traits + 0.25 subwords"
    assert saved.distances == measured(
        "table:3+subwords",
        LANGUAGES,
        Sources(table=tmp_path / "traits.csv", run=open_run(tiny.directory)),
    )
    assert (tmp_path / "out" / "tree.png").exists()


def test_clusters_by_hand_are_those_of_the_file(xelm, tmp_path):
    (tmp_path / "groups.yaml").write_text("nordic: [no, swe]\nslavic:\n- bg\nunassigned: [ja]\n")
    found = xelm(
        *("cluster", "--method", "by-hand", "--groups", tmp_path / "groups.yaml"),
        *("--out", tmp_path / "out", "--json"),
    ).json()
    assert found["clusters"] == {"nordic": ["no", "sv"], "slavic": ["bg"]}
    assert (found["method"], found["unassigned"]) == ("by-hand", ["ja"])
    assert list(Clustering.load(tmp_path / "out").made_from) == ["groups.yaml"]


def test_tokens_of_a_run_in_balance(xelm, tiny, tmp_path, undrawn):
    found = xelm(
        *("cluster", "-k", 2, "--rule", "balanced", "--balance", "tokens"),
        *("--run", tiny.directory, "--out", tmp_path / "out"),
    )
    assert found.code == 0, found.err
    counts = open_run(tiny.directory).store().record["languages"]
    tokens = {tag: counts[tag]["tokens"] for tag in LANGUAGES}
    saved = Clustering.load(tmp_path / "out")
    assert saved.parameters["sizes"] == tokens
    held = [sum(tokens[tag] for tag in members) for members in saved.clusters.values()]
    assert max(held) <= 1.25 * sum(tokens.values()) / 2


# How many clusters


def test_the_number_of_clusters_is_that_of_the_groups_there_are(tmp_path, xelm, undrawn):
    rows = [
        f"{tag},{x},{x + (i % 3)},{-x}"
        for i, (tag, x) in enumerate(
            zip(
                ["en", "de", "nl", "es", "fr", "it", "ja", "ko", "zh"],
                [0] * 3 + [40] * 3 + [99] * 3,
            )
        )
    ]
    (tmp_path / "traits.csv").write_text("l,a,b,c\n" + "\n".join(rows))
    for rule in ("average", "balanced"):
        found = xelm(
            *("cluster", "--method", "table", "--table", tmp_path / "traits.csv", "-k", "auto"),
            *("--rule", rule, "--out", tmp_path / rule),
        )
        assert found.code == 0, found.err
        assert "\nk=3 of 2 to 4: silhouette 0.9" in found.out
        saved = Clustering.load(tmp_path / rule)
        assert set(saved.clusters.values()) == {
            ("en", "de", "nl"),
            ("es", "fr", "it"),
            ("ja", "ko", "zh"),
        }
        assert saved.parameters["reason"] in found.out


def test_what_speaks_for_a_number_of_clusters():
    values = np.full((5, 5), 10.0)
    values[:2, :2] = 1.0
    values[2:, 2:] = 2.0
    np.fill_diagonal(values, 0.0)
    measure = distances.Distances(
        measure="a test",
        languages=("en", "de", "fr", "ja", "sw"),
        values=values,
        coverage=np.ones((5, 5)),
    )
    (two,) = choice.choices(measure, rule="average", resampled=[measure] * 2)
    # 1 - own / other for each language.
    assert two.silhouette == pytest.approx((2 * 0.9 + 3 * 0.8) / 5)
    assert two.gap == pytest.approx(8.0)
    assert two.balance == pytest.approx(3 / 2.5)
    assert (two.stability, two.standard_error) == (1.0, 0.0)
    worse = two._replace(k=3, silhouette=0.8)
    assert choice.best([worse, two]) is two and choice.best([two._replace(k=4), two]) is two
    assert choice.choices(measure, rule="average")[0].stability is None
    sizes = {"en": 9, "de": 9, "fr": 1, "ja": 1, "sw": 1}
    by_tokens = choice.choices(measure, rule="average", sizes=sizes)
    assert by_tokens[0].balance == pytest.approx(18 / 10.5)


def test_stability_falls_where_features_decide_differently():
    draw = np.random.default_rng(0)
    steady = typology.distances(["en", "de", "hi", "ja", "ko", "sw"])
    again = [typology.distances(list(steady.languages), resample=seed) for seed in range(3)]
    assert [d.parameters["resample"] for d in again] == [0, 1, 2]
    assert again[0] != again[1] and again[0].languages == steady.languages
    noise = draw.random((6, 6))
    other = distances.Distances(
        measure="noise",
        languages=steady.languages,
        values=(noise + noise.T) * (1 - np.eye(6)),
        coverage=np.ones((6, 6)),
    )
    same = choice.choices(steady, resampled=[steady])
    apart = choice.choices(steady, resampled=[other])
    assert all(c.stability == 1.0 for c in same)
    assert min(c.stability for c in apart if c.stability is not None) < 0.5


def test_features_of_a_table_are_drawn_anew(tmp_path):
    path = tmp_path / "traits.csv"
    path.write_text("l,a,b,c\nen,0,1,4\nde,1,2,0\nes,5,1,3\n")
    drawn = [table.distances(path, resample=seed).values for seed in range(4)]
    assert not all(np.array_equal(values, drawn[0]) for values in drawn)


# Relatives


def test_relatives_of_a_language_with_the_text_there_is(xelm, tiny, tmp_path):
    run = tiny.directory
    found = xelm("nearest", "it", "--run", run, "--by", "genealogy,typology", "--json").json()
    wanted = genealogy.distances(["it", *LANGUAGES]).relatives("it")
    assert [row["language"] for row in found] == [near.language for near in wanted]
    counts = open_run(run).store().record["languages"]
    by_typology = typology.distances(["it", *LANGUAGES])
    for row, near in zip(found, wanted):
        assert row["genealogy"] == {"distance": near.distance, "coverage": near.coverage}
        assert row["typology"]["distance"] == by_typology.between("it", row["language"])
        assert row["tokens"] == counts[row["language"]]["tokens"]
        assert row["language"] in row["expert"].partition("@")[0].split("-")
    table_of = xelm("nearest", "it", "--run", run).out.splitlines()
    assert table_of[0].split() == [
        "language",
        "mixture",
        "(known)",
        "genealogy",
        "typology",
        "(known)",
        "geography",
        "tokens",
        "expert",
    ]
    assert len(table_of) == 1 + len(LANGUAGES)


def test_relatives_without_a_run_have_no_tokens(xelm):
    found = xelm("nearest", "pt", "--languages", "ja,es,de", "--json").json()
    assert found[0]["language"] == "es"
    assert {row["tokens"] for row in found} == {row["expert"] for row in found} == {None}
    out = xelm("nearest", "pt", "--languages", "ja,es,de").out
    assert "tokens" not in out and "Spanish" in out


def test_a_language_without_data_has_dashes_and_stops_nothing(xelm, tiny):
    found = xelm("nearest", "en", "--languages", "tlh,de,eu", "--by", "typology,genealogy")
    assert (found.code, found.err) == (0, "")
    rows = [line.split() for line in found.out.splitlines()]
    assert [row[0] for row in rows[1:]] == ["de", "eu", "tlh"]
    assert rows[3][2:] == ["-", "(0%)", "-", "(0%)"]
    assert rows[2][-2:] == ["-", "(0%)"]  # Basque has no ancestors in URIEL
    as_json = xelm(
        *("nearest", "it", "--languages", "en,sv", "--run", tiny.directory, "--json"),
        *("--by", "mixture,words"),
    ).json()
    assert as_json[0]["words"] == {"distance": None, "coverage": 0.0}  # of it there is no text
    assert as_json[0]["mixture"]["distance"] > 0


def test_little_knowledge_of_the_nearest_is_a_warning(xelm):
    assert "of eu and es, its nearest relative by mixture, only 37%" in (
        xelm("nearest", "eu", "--languages", "es,ja").err
    )
    assert xelm("nearest", "pt", "--languages", "es,ja").err == ""


def test_the_mixture_counts_shared_subwords_where_there_is_text(tiny, tmp_path):
    run = open_run(tiny.directory)
    shutil.copy(tiny.corpus / "es.jsonl", tmp_path / "sv.jsonl")  # it looks like Spanish
    tags = ["sv", *LANGUAGES]
    without = measured("mixture", tags, Sources())
    of_run = measured("mixture", tags, Sources(run=run))
    read = measured("mixture", tags, Sources(run=run, corpus=tmp_path))
    assert [len(d.parameters["combined"]) for d in (without, of_run, read)] == [3, 4, 4]
    assert without.relatives("sv")[0].language in ("en", "de")
    near = {d.between("sv", "es") - d.between("sv", "fr") for d in (of_run, read)}
    assert read.between("sv", "es") < of_run.between("sv", "es") and len(near) == 2
    subwords = measured("subwords", tags, Sources(run=run, corpus=tmp_path))
    assert subwords.between("sv", "es") < 0.05 < subwords.between("sv", "en")
    assert read.parameters["combined"][-1]["measure"] == "subwords"


def test_subwords_of_one_file_of_several_languages_are_those_of_a_file_each(tiny, tmp_path):
    run, tags = open_run(tiny.directory), ["sv", "da", *LANGUAGES]
    lines = {"sv": documents_of(tiny.corpus, "es"), "da": documents_of(tiny.corpus, "de")}
    for name in ("one", "each"):
        (tmp_path / name).mkdir()
    mixed = [
        json.dumps({"text": text, "language": tag})
        for tag, found in lines.items()
        for text in found
    ]
    (tmp_path / "one" / "all.jsonl").write_text("\n".join(mixed))
    for tag, found in lines.items():
        each = [json.dumps({"text": text}) for text in found]
        (tmp_path / "each" / f"{tag}.jsonl").write_text("\n".join(each))
    one, each = (
        measured("subwords", tags, Sources(run=run, corpus=tmp_path / name))
        for name in ("one", "each")
    )
    np.testing.assert_array_equal(one.values, each.values)
    assert one.between("sv", "es") < 0.05 and one.between("da", "de") < 0.05
    assert set(one.made_from) == {"corpus", "further corpus"}


def test_clusters_that_were_killed_while_drawn_can_be_made_again(
    xelm, tmp_path, monkeypatch, undrawn
):
    command = ("cluster", "-k", 2, "--languages", "en,de,fr,ja", "--out", tmp_path / "out")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Clustering, "plot_tree", killed)
        assert xelm(*command).code == 130
    assert not (tmp_path / "out" / "clusters.json").exists()
    assert xelm(*command).code == 0
    assert len(Clustering.load(tmp_path / "out").clusters) == 2


def test_languages_without_data_are_unassigned_and_told(xelm, tmp_path, undrawn):
    command = ("cluster", "-k", 2, "--languages", "en,de,ja,ko,kok,szl")
    found = xelm(*command, "--out", tmp_path / "out")
    assert "typology knows too little of kok, szl, which are in no cluster" in found.err
    assert "unassigned: Konkani, Silesian" in found.out
    saved = Clustering.load(tmp_path / "out")
    assert (saved.unassigned, saved.languages) == (("kok", "szl"), ("en", "de", "ja", "ko"))
    assert (
        saved.clusters
        == Clustering.load(_cluster_into(xelm, tmp_path / "alone", "en,de,ja,ko")).clusters
    )
    whole = xelm(*command, "--method", "mixture", "--out", tmp_path / "whole")
    assert (whole.code, whole.err) == (0, "")
    assert Clustering.load(tmp_path / "whole").unassigned == ()


def _cluster_into(xelm, directory, languages):
    assert xelm("cluster", "-k", 2, "--languages", languages, "--out", directory).code == 0
    return directory


def test_equal_documents_make_no_empty_clusters(xelm, tmp_path, undrawn):
    texts = [f"{'abcdefghij'[i]} {'wxyz'[i % 4]} lorem" for i in range(10)]
    lines = [{"text": text} for text in [texts[0]] * 150 + [texts[1]] * 120 + texts]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "sw.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ("cluster", "--method", "tfidf", "--corpus", tmp_path / "corpus", "--json", "-k")
    found = xelm(*command, 8, "--out", tmp_path / "out").json()
    assert len(found["clusters"]) == 8
    saved = Clustering.load(tmp_path / "out").documents or {}
    assert min(sum(counts.values()) for counts in saved.values()) > 0
    refused = xelm(*command, 11, "--out", tmp_path / "more")
    assert refused.code == 2 and "between 1 and 10 different documents" in refused.err
    assert not (tmp_path / "more").exists()
