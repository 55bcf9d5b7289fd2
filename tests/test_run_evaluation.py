"""A RUN through the command line: evaluating and generating."""

import json
import math
import shutil

import pytest
import torch
from shared import LANGUAGES, NAMES, documents_of
from transformers import AutoModelForCausalLM

from xelm import open_run
from xelm.runs.evaluation import EVALUATED, evaluate


@pytest.fixture(scope="module")
def evaluated(xelm, tiny, tmp_path_factory):
    """The tiny RUN with results, and the rows that were printed."""
    directory = tmp_path_factory.mktemp("evaluated") / "RUN"
    shutil.copytree(tiny.directory, directory)
    rows = xelm("evaluate", directory, "--corpus", tiny.held_out, "--json").json()
    return directory, {(row["system"], row["routing"], row["language"]): row for row in rows}


def test_every_system_is_evaluated_on_every_language(evaluated):
    systems = [("seed", None), ("dense", None), ("en-es", None), ("de-fr", None)]
    systems += [("ensemble", name) for name in EVALUATED]
    assert set(evaluated[1]) == {(*system, tag) for system in systems for tag in LANGUAGES}


def test_results_lie_in_the_run(evaluated):
    record = json.loads((evaluated[0] / "results" / "results.json").read_text())
    assert record["format"] == 1
    rows = {(r["system"], r["routing"], r["language"]): r for r in record["rows"]}
    assert rows == evaluated[1]


def test_perplexity_and_bits_follow_from_nats(evaluated, tiny):
    tokenizer = open_run(tiny.directory).tokenizer()
    for (_, _, language), row in evaluated[1].items():
        texts = documents_of(tiny.held_out, language)
        assert row["documents"] == len(texts)
        assert row["tokens"] == sum(len(ids) + 1 for ids in tokenizer.encode(texts))
        assert row["bytes"] == sum(len(text.encode()) for text in texts)
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"] / row["tokens"]))
        assert row["bits_per_byte"] == pytest.approx(row["nll"] / math.log(2) / row["bytes"])


def test_nats_are_those_of_the_plain_model(evaluated, tiny):
    run = open_run(evaluated[0])
    tokenizer = run.tokenizer()
    for system, directory in {
        "seed": run.seed,
        "en-es": run.directory / "experts/en-es/v1",
    }.items():
        reference = AutoModelForCausalLM.from_pretrained(directory).eval()
        nats = 0.0
        for ids in tokenizer.encode(documents_of(tiny.held_out, "es")):
            framed = [1, *ids, 2]
            # Windows of 32 predicted tokens, which do not see each other.
            for begin in range(0, len(framed) - 1, 32):
                part = torch.tensor(framed[begin : begin + 33])
                with torch.no_grad():
                    logits = reference(part[None, :-1]).logits[0]
                nats += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
        assert evaluated[1][system, None, "es"]["nll"] == pytest.approx(nats, rel=1e-5)


def test_routing_by_language_is_the_expert_of_that_language(evaluated):
    rows = evaluated[1]
    for name, languages in NAMES.items():
        for language in languages:
            assert rows["ensemble", "language", language]["nll"] == pytest.approx(
                rows[name, None, language]["nll"], rel=1e-6
            )


def test_with_routing_by_language_alone_experts_are_scored_on_their_own_languages(
    xelm, evaluated, copy
):
    command = ("evaluate", copy.directory, "--corpus", copy.held_out, "--routing", "language")
    rows = {(r["system"], r["routing"], r["language"]): r for r in xelm(*command, "--json").json()}
    systems = [("seed", None), ("dense", None), ("ensemble", "language")]
    own = {(name, None, tag) for name, languages in NAMES.items() for tag in languages}
    assert set(rows) == own | {(*system, tag) for system in systems for tag in LANGUAGES}
    for key, row in rows.items():
        assert row["nll"] == pytest.approx(evaluated[1][key]["nll"], rel=1e-6)
    assert xelm("report", copy.directory).code == 0
    page = (copy.directory / "results" / "report.html").read_text(encoding="utf-8")
    assert "Not every expert was asked in every language." in page
    assert "that expert is the best of all" not in page


def test_results_of_other_options_are_kept(xelm, evaluated, copy):
    command = ("evaluate", copy.directory, "--corpus", copy.held_out)
    results = copy.directory / "results"
    assert xelm(*command).code == 0
    first = (results / "results.json").read_bytes()
    assert xelm(*command).code == 0
    assert [path.name for path in results.glob("*.json")] == ["results.json"]
    fewer = xelm(*command, "--max-documents", 1)
    (kept,) = results.glob("results-*.json")
    assert f"results of other text or options are kept in {kept}" in fewer.err
    assert kept.read_bytes() == first
    (results / "results.json").write_text("{")
    assert xelm(*command).code == 0
    assert len(list(results.glob("results-*.json"))) == 2
    assert (results / "results.json").read_bytes() == first


def test_the_posterior_is_never_far_behind_the_best_expert(evaluated):
    # p(text) = sum_j p_j(text) / 2 >= max_j p_j(text) / 2: at most ln 2 a document.
    rows = evaluated[1]
    for language in LANGUAGES:
        mixed = rows["ensemble", "posterior", language]
        best = min(rows[name, None, language]["nll"] for name in NAMES)
        assert mixed["nll"] <= best + mixed["documents"] * math.log(2) + 1e-3


def test_experts_know_their_own_languages_better_than_the_other(evaluated):
    rows = evaluated[1]
    for language in LANGUAGES:
        own, other = sorted(NAMES, key=lambda name: language not in NAMES[name])
        assert rows[own, None, language]["nll"] < rows[other, None, language]["nll"]
        assert rows[own, None, language]["nll"] < rows["seed", None, language]["nll"]


@pytest.mark.parametrize("top_m", [None, 1])
def test_evaluating_gives_the_scores_of_the_ensemble(evaluated, tiny, top_m):
    run = open_run(evaluated[0])
    routings = ("language", "tfidf", "uniform", "posterior")
    rows = evaluate(run, tiny.held_out, routings=routings, top_m=top_m, save=False)
    for routing in routings:
        ensemble = run.ensemble(routing, top_m=top_m)
        for language in LANGUAGES:
            texts = documents_of(tiny.held_out, language)
            (row,) = (r for r in rows if r.routing == routing and r.language == language)
            scores = ensemble.score(texts, [language] * len(texts))
            assert row.nll == pytest.approx(scores.nats.sum(), rel=1e-6)
            assert row.tokens == scores.tokens.sum()


def test_the_table_shows_the_results(xelm, evaluated, tiny, tmp_path):
    shutil.copytree(evaluated[0], tmp_path / "RUN")
    outcome = xelm(
        "evaluate", tmp_path / "RUN", "--corpus", tiny.held_out, "--routing", "uniform",
        "--max-documents", 2,
    )  # fmt: skip
    record = json.loads((tmp_path / "RUN" / "results" / "results.json").read_text())
    rows = {(r["system"], r["routing"], r["language"]): r for r in record["rows"]}
    assert {row["documents"] for row in rows.values()} == {2}
    assert {routing for _, routing, _ in rows} == {None, "uniform"}
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["ensemble"]
    assert lines[1].split() == ["seed", "dense", "by", "uniform"]
    assert lines[0].endswith("ensemble") and len(lines[0]) == len(lines[1])
    german = next(line for line in lines if line.split()[:2] == ["de", "German"])
    columns = [("seed", None), ("dense", None), ("ensemble", "uniform")]
    wanted = [
        f"{rows[*c, 'de'][key]:.{digits}f}"
        for c in columns
        for key, digits in (("perplexity", 1), ("bits_per_byte", 3))
    ]
    assert german.split()[2:] == wanted


def test_generating_is_decided_by_the_seed_and_the_weights_are_told(xelm, tiny):
    prompt = documents_of(tiny.corpus, "de")[0][:12]
    command = ("generate", tiny.directory, prompt, "--max-new-tokens", 8, "--temperature", 2)
    first, second = xelm(*command, "--json"), xelm(*command, "--json")
    other = xelm(*command, "--json", "--random-seed", 1)
    assert first.json() == second.json() != other.json()
    assert set(first.json()["weights"]) == set(NAMES)
    assert sum(first.json()["weights"].values()) == pytest.approx(1.0)
    plain = xelm(*command)
    assert plain.out == prompt + first.json()["text"] + "\n"
    assert plain.err.startswith("experts: ")
    hard = xelm(*command, "--json", "--routing", "language", "--language", "deu").json()
    assert hard["weights"] == {"en-es": 0.0, "de-fr": 1.0}


def test_tfidf_routing_sends_a_text_to_the_expert_of_its_language(tiny):
    ensemble = open_run(tiny.directory).ensemble("tfidf", temperature=0.02)
    for name, languages in NAMES.items():
        for language in languages:
            scores = ensemble.score(documents_of(tiny.held_out, language))
            assert scores.weights[name].mean() > 0.6
