"""The report says what a RUN holds, in numbers that can be computed by hand, and what it lacks."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock

import matplotlib
import numpy as np
import pytest

from clustering import grouping
from clustering.clustering import Clustering
from clustering.distances import Distances
from clustering.errors import UserError
from clustering.figures import cluster_colours
from clustering.files import write_json
from clustering.vectoriser import Vectoriser
from experts.expert import Expert
from experts.registry import Registry
from xelm.evaluation.report import figures
from xelm.evaluation.report.missing import missing
from xelm.evaluation.report.pictures import _curve, pictures
from xelm.evaluation.report.tables import cluster_table, expert_table
from xelm.evaluation.report.verdict import compare, verdict
from xelm.evaluation.report.words import perplexity, signed
from xelm.evaluation.results import SEED
from xelm.models.families import family
from xelm.presets import quickstart
from xelm.runs.report import read, report
from xelm.runs.run import open_run
from xelm.settings import to_json

ROOT = Path(__file__).parent.parent
SHA = {"model.safetensors": "a" * 64}
LANGUAGES = ("de", "en", "es", "ja", "ko", "tr")
# Perplexities: seed, dense, ensemble by language, ensemble by TF-IDF.
SCORES = {
    "de": (100.0, 50.0, 40.0, 45.0),
    "en": (100.0, 40.0, 44.0, 48.0),
    "es": (80.0, 60.0, 45.0, 60.0),
    "ja": (200.0, 100.0, 80.0, 90.0),
    "ko": (120.0, 70.0, 77.0, 70.0),
    "tr": (150.0, 80.0, 74.0, 77.0),
    "sv": (300.0, 290.0, 30.0, 33.0),
}


def row(system, routing, language, value):
    return {
        "system": system,
        "routing": routing,
        "language": language,
        "documents": 2,
        "tokens": 10,
        "bytes": 40,
        "nll": 10 * math.log(value),
        "perplexity": value,
        "bits_per_byte": math.log2(value) / 4,
    }


def rows(scores=SCORES, experts=("de-en-es", "ja-ko-tr", "sv"), dense=True):
    systems = [("seed", None), ("dense", None), ("ensemble", "language"), ("ensemble", "tfidf")]
    found = [
        row(*system, language, value)
        for language, values in scores.items()
        for system, value in zip(systems, values)
        if dense or system[0] != "dense"
    ]
    for expert in experts:
        for language, values in scores.items():
            own = language in expert.split("-")
            found.append(row(expert, None, language, values[2] if own else 2 * values[0]))
    return found


def clusters_of(values, languages, k):
    measured = Distances(
        measure="typology",
        languages=tuple(languages),
        values=values,
        coverage=np.ones_like(values),
    )
    return grouping.cluster(measured, k)


def two_clusters():
    """de-en-es and ja-ko-tr, near within and far between."""
    near = np.array([[0.0, 0.2, 0.3], [0.2, 0.0, 0.1], [0.3, 0.1, 0.0]])
    return clusters_of(np.kron(np.eye(2), near - 0.8) + 0.8, LANGUAGES, 2)


def write_metrics(folder, tokens, start=8.0, lines=4):
    folder.mkdir(parents=True, exist_ok=True)
    text = (
        json.dumps({"step": n, "tokens": tokens * n // lines, "loss": start - n / lines})
        for n in range(1, lines + 1)
    )
    (folder / "metrics.jsonl").write_text("\n".join(text) + "\n")


def fake_run(
    directory,
    *,
    languages=LANGUAGES,
    clusters=None,
    found=None,
    grown=("sv",),
    dense_tokens=6000,
    status="published",
    record=None,
):
    """A RUN as the commands leave it, without weights."""
    config = to_json(quickstart())
    facts = {"corpus": "CORPUS", "corpus_sha256": "c" * 64, "seed_from": None}
    facts |= {"languages": list(languages), "command": "xelm init RUN", "xelm": "0.1.0"}
    write_json(directory / "run.json", {"format": 3, "config": config, **facts, **(record or {})})
    write_json(directory / "seed" / "config.json", family("llama").write(quickstart().model))
    write_metrics(directory / "seed", 5000)
    experts = []
    if clusters is not None:
        clusters.save(directory)
        for name, members in clusters.clusters.items():
            experts.append(
                Expert(
                    name=name,
                    cluster=name,
                    languages=tuple(t for t in members if clusters.cluster_of(t) == name),
                    status=status,
                    sha256=SHA if status == "published" else {},
                    tokens=1000 * len(members) if status == "published" else 0,
                )
            )
    for tag in grown if experts else ():
        experts.append(
            Expert(
                name=tag,
                parent=experts[0].reference,
                round=2,
                languages=(tag,),
                status="published",
                sha256=SHA,
                tokens=7000,
            )
        )
    for expert in experts:
        published = expert.status == "published"
        folder = expert.directory(directory) if published else directory / "train" / expert.name
        write_metrics(folder, expert.tokens or 500, start=5.0)
    if dense_tokens:
        write_metrics(directory / "dense", dense_tokens, start=5.0)
    Registry(seed_sha256=SHA, experts=tuple(experts)).save(directory)
    if found is not None:
        results = {"format": 1, "xelm": "0.1.0", "corpus": "VALID", "corpus_sha256": "d" * 64}
        write_json(directory / "results" / "results.json", {**results, "rows": found})
    return open_run(directory)


class Page(HTMLParser):
    """What the tests ask of a page: rows of its tables, ids, addresses, and that tags match."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self, text):
        super().__init__()
        self.tables, self.ids, self.addresses, self.bold, self.open = [], [], [], [], []
        self.tags, self.attributes = [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.attributes.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        names = ("src", "href", "xlink:href", "data", "srcset", "action", "poster")
        self.addresses += [found[name] for name in names if name in found]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "br" and "tr" in self.open:
            self.tables[-1][-1][-1] += " "
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "strong" and "td" in self.open:
            self.bold.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def texts(page):
    """Rows of the first table by their head."""
    rows = [[" ".join(cell.split()) for cell in row] for row in page.tables[0]]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A RUN with everything, and its page."""
    run = fake_run(tmp_path_factory.mktemp("full") / "RUN", clusters=two_clusters(), found=rows())
    return run, report(run).read_text()


def small(directory, **options):
    """Like `full`, without the figures that take time."""
    plain = replace(two_clusters(), distances=None, merges=None)
    return fake_run(directory, clusters=plain, grown=(), **options)


def ensemble_times(factor):
    return {t: (s, d, factor * d, factor * d) for t, (s, d, *_) in SCORES.items()}


def test_the_numbers_of_the_language_table(full):
    table = texts(Page(full[1]))
    assert table["language"] == [
        "seed",
        "dense",
        "ensemble by language",
        "ensemble by tfidf",
        "change: dense to ensemble by language",
    ]
    bits = [f"{math.log2(value) / 4:.3f}" for value in SCORES["de"]]
    assert table["German (de)"] == [
        f"100.0 {bits[0]}", f"50.0 {bits[1]}", f"40.0 {bits[2]}", f"45.0 {bits[3]}", "−20.0 %",
    ]  # fmt: skip
    assert table["English (en)"][-1] == "+10.0 %"
    assert [cell.split()[0] for cell in table["mean of 6"]] == [
        "125.0", "66.7", "60.0", "65.0", "−10.0",
    ]  # fmt: skip
    mean_bits = sum(math.log2(SCORES[tag][0]) / 4 for tag in LANGUAGES) / 6
    assert table["mean of 6"][0] == f"125.0 {mean_bits:.3f}"
    assert table["Swedish (sv)"][-1] == "−89.7 %"


def test_the_best_of_every_row_is_bold_and_nothing_else(full):
    # Korean twice: dense and TF-IDF both have 70. The last is the mean.
    wanted = ["40.0", "40.0", "45.0", "80.0", "70.0", "70.0", "74.0", "30.0", "60.0"]
    assert Page(full[1]).bold == wanted


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234"), (2.5e7, "2.5e+07")],
)
def test_perplexities_have_as_many_digits_as_say_something(value, text):
    assert perplexity(value) == text


def test_the_verdict_of_a_better_ensemble(full):
    facts = read(full[0])
    sentences = verdict(facts, compare(facts))
    assert sentences[0] == (
        "The ensemble is better than dense training: its mean perplexity is 10.0 % lower, and it "
        "is better in 4 of 6 languages."
    )
    assert sentences[1] == (
        "The mean perplexity over 6 languages of the RUN's corpus is 125.0 for the seed, 66.7 for "
        "dense training, and 60.0 for the ensemble (routing by language, which is given the "
        "language)."
    )
    ratios = [SCORES[tag][2] / SCORES[tag][1] for tag in LANGUAGES]
    change = 100 * (math.prod(ratios) ** (1 / 6) - 1)
    assert sentences[2].startswith(f"The change is {signed(change)} % when every language")
    assert sentences[3].startswith("This is at equal compute: dense was trained on 6,000 tokens")
    assert "1 grown expert (sv), trained on 7,000 tokens more" in sentences[4]
    assert "Swedish (sv) −90.0 %" in sentences[5]
    assert all(sentence in full[1].replace("&#39;", "'") for sentence in sentences)


def test_the_headline_is_of_the_default_routing_and_the_best_is_told_as_such(tmp_path):
    """A routing that is chosen on the text it is measured on has a figure that no user gets."""
    usual = [row("ensemble", "learned", tag, SCORES[tag][1] * 1.1) for tag in LANGUAGES]
    run = small(tmp_path / "RUN", found=[*rows(experts=()), *usual])
    facts = read(run)
    comparison = compare(facts)
    assert comparison.ensemble == ("ensemble", "learned")
    assert facts.systems[2] == ("ensemble", "learned")  # the first column after seed and dense
    sentences = verdict(facts, comparison)
    assert sentences[0] == (
        "The ensemble is worse than dense training: its mean perplexity is 10.0 % higher, and it "
        "is better in none of 6 languages."
    )
    assert "73.3 for the ensemble (routing by learned, the default)." in sentences[1]
    assert sentences[2] == (
        "Of 3 routings the lowest on this text is that by language, which is given the language: "
        "60.0."
    )


@pytest.mark.parametrize(
    ("factor", "outcome", "wins"),
    [
        (1.25, "worse than dense training: its mean perplexity is 25.0 % higher", "none"),
        (1.0, "as good as dense training: their mean perplexities are equal", "none"),
        (0.5, "better than dense training: its mean perplexity is 50.0 % lower", "6"),
    ],
)
def test_the_verdict_follows_the_numbers(tmp_path, factor, outcome, wins):
    facts = read(small(tmp_path / "RUN", found=rows(ensemble_times(factor), experts=())))
    headline = verdict(facts, compare(facts))[0]
    assert headline == f"The ensemble is {outcome}, and it is better in {wins} of 6 languages."


def test_a_mean_against_the_majority_says_but(tmp_path):
    scores = ensemble_times(0.9) | {"ja": (200.0, 100.0, 300.0, 300.0)}
    facts = read(small(tmp_path / "RUN", found=rows(scores, experts=())))
    assert "higher, but it is better in 5 of 6" in verdict(facts, compare(facts))[0]


def test_unequal_compute_is_said(tmp_path):
    facts = read(small(tmp_path / "RUN", found=rows(experts=()), dense_tokens=9000))
    assert any(
        sentence.startswith("This is not at equal compute: dense was trained on 9,000 tokens")
        for sentence in verdict(facts, compare(facts))
    )


def test_without_dense_the_seed_is_the_baseline_and_no_fair_one(tmp_path):
    run = small(tmp_path / "RUN", found=rows(dense=False, experts=()), dense_tokens=0)
    facts = read(run)
    comparison = compare(facts)
    assert comparison.baseline == ("seed", None)
    assert comparison.change == pytest.approx(100 * (60 / 125 - 1))
    assert "better than the seed" in verdict(facts, comparison)[0]
    assert any("no fair comparison" in sentence for sentence in verdict(facts, comparison))
    assert "xelm train RUN --dense" in [part.command for part in missing(facts)]


def test_a_bare_run_names_what_is_missing_and_how_to_make_it(tmp_path):
    run = fake_run(tmp_path / "RUN", dense_tokens=0)
    (run.directory / "registry.json").unlink()
    page = report(run).read_text()
    for command in (
        "xelm branch RUN --clusters DIR",
        "xelm train RUN --dense",
        "xelm evaluate RUN --corpus DIR",
    ):
        assert f"<code>{command}</code>" in page
    assert "not been evaluated yet" in page
    assert "No expert has been trained yet." in page
    Page(page)


def test_experts_in_training_are_shown_and_named(tmp_path):
    facts = read(small(tmp_path / "RUN", status="training"))
    assert missing(facts)[0] == (
        "2 experts not trained to the end: de-en-es, ja-ko-tr.",
        "xelm train RUN --all",
    )
    assert [(row["share"], row["tokens"]) for row in expert_table(facts)] == [("–", 500)] * 2
    labels = {row[0] for row in pictures(facts)["loss-experts"].rows}
    assert labels == {"dense", "de-en-es (in training)", "ja-ko-tr (in training)"}


def test_an_evaluation_older_than_an_expert_is_said(tmp_path):
    facts = read(small(tmp_path / "RUN", found=rows(experts=("de-en-es",))))
    assert missing(facts) == [
        ("The evaluation is without ja-ko-tr.", "xelm evaluate RUN --corpus DIR")
    ]


def test_shares_are_of_the_experts_of_clusters(full):
    shares = {row["expert"].name: row["share"] for row in expert_table(read(full[0]))}
    assert shares == {"de-en-es": "50.0 %", "ja-ko-tr": "50.0 %", "sv": "extra"}


def test_text_from_elsewhere_cannot_break_the_page(tmp_path):
    evil = '<script>alert("1")</script>&amp;$x^2$'
    found = [*rows(experts=()), row("seed", None, "<b>x", 5.0)]
    record = {"corpus": evil, "command": evil, "seed_from": evil, "corpus_sha256": evil}
    page = report(small(tmp_path / "R<i>", found=found, record=record)).read_text()
    assert "<script" not in page and "<b>" not in page and "<i>" not in page
    assert page.count("&lt;script&gt;") == 4
    assert "&lt;b&gt;x" in page
    Page(page)


def test_nothing_is_loaded_from_elsewhere(full):
    page = Page(full[1])
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "@import" not in full[1]
    assert set(re.findall(r"url\((.)", full[1])) <= {"#"}


def test_the_page_is_accessible(full):
    page = Page(full[1])
    assert len(page.ids) == len(set(page.ids))
    targets = [address[1:] for address in page.addresses if address.startswith("#")]
    assert targets and set(targets) <= set(page.ids)
    labels = [found.get("aria-label") for _, found in page.attributes if found.get("role") == "img"]
    assert len(labels) == page.tags.count("figure") == page.tags.count("svg") == 7
    assert all(label and label.endswith(".") for label in labels)
    assert all("scope" in found for tag, found in page.attributes if tag == "th")
    assert ("html", {"lang": "en"}) in page.attributes


def test_the_same_run_gives_the_same_bytes(full, tmp_path):
    first = full[0].directory
    again = tmp_path / first.name
    shutil.copytree(first, again, ignore=shutil.ignore_patterns("report.html", "figures"))
    report(open_run(again))
    names = sorted(p.relative_to(first) for p in (first / "results").rglob("*") if p.is_file())
    assert len(names) == 2 + 3 * 7
    assert names == sorted(
        p.relative_to(again) for p in (again / "results").rglob("*") if p.is_file()
    )
    for name in names:
        assert (first / name).read_bytes() == (again / name).read_bytes(), name


def test_the_numbers_of_every_figure_lie_beside_it(full):
    folder = full[0].results / "figures"

    def read_csv(name):
        return list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))

    cells = {(c["expert"], c["language"]): c for c in read_csv("experts-by-language")}
    assert float(cells["ja-ko-tr", "tr"]["ratio"]) == pytest.approx(74 / 150)
    assert float(cells["sv", "ja"]["perplexity"]) == pytest.approx(400)
    assert len(cells) == 3 * 7
    losses = [float(line["loss"]) for line in read_csv("loss-seed")]
    assert losses == [7.75, 7.5, 7.25, 7.0]
    pairs = read_csv("distances")
    assert len(pairs) == 6 * 5 / 2
    assert (pairs[0]["language_a"], pairs[0]["language_b"]) == ("en", "de")
    assert float(pairs[0]["distance"]) == pytest.approx(0.2)
    assert read_csv("tree")[0]["members_b"] == "es"


def test_a_figure_of_what_is_gone_is_removed(tmp_path):
    run = small(tmp_path / "RUN")
    old = run.results / "figures" / "tree.svg"
    old.parent.mkdir(parents=True)
    old.write_text("old")
    report(run)
    assert not old.exists()
    assert (old.parent / "loss-seed.svg").exists()


def test_clusters_of_documents_show_what_they_hold(tmp_path):
    documents = {"c0": {"en": 30, "de": 10}, "c1": {"ja": 20, "en": 5}}
    clusters = Clustering(
        method="tfidf",
        clusters={name: tuple(counts) for name, counts in documents.items()},
        languages=("de", "en", "ja"),
        documents=documents,
        vectoriser=Vectoriser(idf=np.ones(4), projection=np.ones((4, 2))),
        centres=np.ones((2, 2)),
    )
    run = fake_run(tmp_path / "RUN", languages=clusters.languages, clusters=clusters, grown=())
    facts = read(run)
    assert {group.name: group.languages for group in facts.groups} == {
        "c0": ("de", "en"),
        "c1": ("ja",),
    }
    assert [row["documents"] for row in cluster_table(facts, None)] == [40, 25]
    found = pictures(facts)
    assert found["composition"].rows[0] == ("c0", "en", 30, 0.75)
    assert found["tree"] == found["distances"] == found["plane"] == found["map"] == ("", "")


def test_one_language_makes_a_page(tmp_path):
    one = clusters_of(np.zeros((1, 1)), ("sw",), 1)
    found = rows({"sw": SCORES["de"]}, experts=("sw",))
    run = fake_run(tmp_path / "RUN", languages=("sw",), clusters=one, grown=(), found=found)
    assert "better in 1 of 1 language." in report(run).read_text()


def test_languages_stand_in_the_order_and_colour_of_their_clusters(full):
    facts = read(full[0])
    colours = cluster_colours(["de-en-es", "ja-ko-tr", "sv"])
    assert [(g.name, g.languages, g.colour) for g in facts.groups] == [
        ("de-en-es", ("de", "en", "es"), colours["de-en-es"]),
        ("ja-ko-tr", ("ja", "ko", "tr"), colours["ja-ko-tr"]),
        ("sv", ("sv",), colours["sv"]),
    ]
    for colour in colours.values():
        assert f"background:{colour}" in full[1]


def test_damaged_results_are_the_users_to_mend(tmp_path):
    run = small(tmp_path / "RUN", found=[{"system": "seed"}])
    with pytest.raises(UserError, match=r"results\.json is damaged.*xelm evaluate"):
        report(run)


def test_long_trainings_are_averaged():
    lines = [{"tokens": 10 * n, "loss": float(n % 2)} for n in range(1, 1001)]
    held_out = [
        {"tokens": 0, "loss": 4.0},
        {"tokens": 9, "loss": None},
        {"tokens": 20, "loss": 3.0},
    ]
    facts = Mock(metrics={SEED: lines}, held_out={SEED: held_out})
    curve = _curve(facts, SEED, "seed", "#000000")
    assert len(curve.tokens) == 334 and curve.tokens[-1] == 10_000
    assert curve.losses[0] == pytest.approx(2 / 3)
    assert curve.held_out == [(0, 4.0), (20, 3.0)]


def test_curves_are_drawn_in_their_colours_on_the_axes_given():
    ax = figures.new_axes((4, 3))
    dense = figures.Curve(label="dense", tokens=[1, 2], losses=[3.0, 2.0], colour="#222222")
    expert = figures.Curve(label="a", tokens=[1, 4], losses=[3.0, math.nan], colour="#ddcc77")
    curves = [replace(dense, dashed=True, held_out=[(0, 4.0), (2, 2.5)]), expert]
    assert figures.loss_curves(curves, ax) is ax
    assert [line.get_color() for line in ax.lines] == ["#222222", "#ddcc77"]
    assert [line.get_xdata().tolist() for line in ax.lines] == [[1, 2], [1, 4]]
    (circles,) = ax.collections
    assert circles.get_offsets().tolist() == [[0, 4.0], [2, 2.5]]
    assert ax.get_xlim()[0] == 0
    assert ax.get_ylabel() == "loss (nats per predicted token)"


def test_the_heat_map_is_centred_at_the_seed_and_frames_the_own_languages():
    ax = figures.new_axes((6, 3))
    ratios = np.array([[0.5, 2.0, np.nan], [12.0, 1.0, 0.9]])
    experts, languages = {"a": "#111111", "b": "#222222"}, dict.fromkeys("xyz", "#333333")
    drawn = figures.expert_heatmap(ratios, experts, languages, {"a": ("x",), "b": ("z",)}, ax)
    assert drawn is ax
    image = ax.images[0]
    assert image.norm(0.0) == 0.5 and image.norm(math.log(4)) == 1
    frames = [patch.get_xy() for patch in ax.patches]
    assert frames == [(-0.5, -0.5), (1.5, 0.5)]
    assert [text.get_text() for text in ax.texts] == ["−50", "+100", "×12", "0", "−10"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


@pytest.mark.slow
def test_neither_jax_nor_pyplot_is_imported_and_no_state_is_left(full):
    code = (
        "import sys, xelm.runs.run as run\n"
        "from xelm.evaluation.report import page, pictures\n"
        "from xelm.runs import report\n"
        "assert not {'jax', 'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "found = pictures.pictures(report.read(run.open_run(sys.argv[1])))\n"
        "page.files(found['loss-seed'])\n"
        "assert not {'jax', 'matplotlib.pyplot'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, full[0].directory], cwd=ROOT, check=True)
    assert not matplotlib.rcParams["svg.hashsalt"]
