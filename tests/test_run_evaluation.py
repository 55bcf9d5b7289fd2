"""A RUN through the command line: evaluating and generating."""

import json
import math
import operator
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from shared import LANGUAGES, NAMES, documents_of
from transformers import AutoModelForCausalLM

from experts.expert import Expert
from experts.registry import Registry
from xelm import Routing, open_run
from xelm.evaluation.options import EVALUATED, EvaluationOptions
from xelm.inference.scoring import score_documents
from xelm.runs.evaluate import _background, _trained, evaluate


@pytest.fixture(scope="module")
def evaluated(xelm, tiny, tmp_path_factory):
    """The tiny RUN with results, and the rows that were printed."""
    directory = tmp_path_factory.mktemp("evaluated") / "RUN"
    shutil.copytree(tiny.directory, directory)
    rows = xelm("evaluate", directory, "--corpus", tiny.held_out, "--json").json()["rows"]
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


def test_calibration_is_of_the_whole_mixture(evaluated):
    """Where the router gives all to one expert, it is that expert's; sums are of every language."""
    rows = evaluated[1]
    for name, languages in NAMES.items():
        for tag in languages:
            own, mixed = rows[name, None, tag], rows["ensemble", "language", tag]
            assert mixed["calibration"] == pytest.approx(own["calibration"], abs=1e-6)
            assert own["calibration"]["tokens"] == min(1000, own["tokens"])
            assert own["calibration"]["brier"] < rows["seed", None, tag]["calibration"]["brier"]
    record = json.loads((evaluated[0] / "results" / "results.json").read_text())
    for each in record["summaries"]:
        mine = [rows[each["system"], each["routing"], tag] for tag in each["languages"]]
        counts = [row["calibration"]["tokens"] for row in mine]
        assert each["calibration"]["tokens"] == sum(counts)
        for name in ("accuracy", "brier"):
            values = [row["calibration"][name] for row in mine]
            mean = sum(map(operator.mul, values, counts)) / sum(counts)
            assert each["calibration"][name] == pytest.approx(mean)


def test_routers_are_judged_by_the_expert_for_the_language(evaluated, tiny):
    rows, run = evaluated[1], open_run(evaluated[0])
    for tag in LANGUAGES:
        known = rows["ensemble", "language", tag]["router"]
        assert (
            known["accuracy"] == known["experts_read"] == 1
            and known["entropy"] == known["ece"] == 0
        )
        best = min(rows[name, None, tag]["nll"] for name in NAMES)
        for routing in EVALUATED:
            row = rows["ensemble", routing, tag]
            regret = (row["nll"] - best) / math.log(2) / row["bytes"]
            assert row["router"]["regret"] == pytest.approx(regret, abs=1e-9)
    # By hand for a posterior, whose weights are those of scores of what came before.
    texts = documents_of(tiny.held_out, "de")
    single = {name: run.ensemble(Routing(name="fixed", weights={name: 1.0})) for name in NAMES}
    right, entropies = [], []
    for text in texts:
        nats = {name: along(each, text) for name, each in single.items()}
        german = 1 / (1 + np.exp(nats["de-fr"] - nats["en-es"]))
        right += np.where(german == 0.5, 0.5, german > 0.5).tolist()
        p = np.clip([german, 1 - german], 1e-300, None)
        entropies += (-(p * np.log2(p)).sum(axis=0)).tolist()
    found = rows["ensemble", "posterior", "de"]["router"]
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert found["entropy"] == pytest.approx(np.mean(entropies), rel=1e-4)
    assert found["experts_read"] == 2


def along(ensemble, text):
    """Nats of what comes before each token of a text."""
    ids = ensemble.tokenizer.encode([text])[0]
    (index,) = np.flatnonzero(np.isfinite(ensemble.router.weights))
    (scores,) = score_documents(
        ensemble.model,
        ensemble.parameters[index],
        [np.asarray(ids)],
        text_format=ensemble.tokenizer.text_format,
        context_length=32,
    )
    return np.concatenate([[0.0], -np.cumsum(scores.astype(float))])[:-1]


def test_a_grown_expert_was_trained_on_the_languages_of_those_it_comes_from():
    branched = Expert(name="a", languages=("de", "ru"))
    registry = Registry(seed_sha256={"x": "f" * 64}, experts=(branched,))
    registry = registry.publish("a", 1, sha256={"x": "1" * 64}, tokens=1)
    for child, parent, tag in (("pl", "a@v1", "pl"), ("cs", "pl@v1", "cs")):
        found = Expert(
            name=child,
            parent=parent,
            round=registry.expert(parent[:-3]).round + 1,
            languages=(tag,),
        )
        registry = replace(registry, experts=(*registry.experts, found))
        registry = registry.publish(child, 1, sha256={"x": "2" * 64}, tokens=1)
    assert _trained(registry, registry.expert("a")) == ["de", "ru"]
    assert _trained(registry, registry.expert("cs")) == ["cs", "pl", "de", "ru"]


def test_the_dense_baseline_was_not_trained_on_languages_in_no_cluster(xelm, initialised, tmp_path):
    directory = tmp_path / "RUN"
    shutil.copytree(initialised[0], directory)
    assert _background(open_run(directory), (), ()).trained["dense"] == list(LANGUAGES)
    (tmp_path / "groups.yaml").write_text("a: [en, es]\nb: [fr]\nunassigned: [de]\n")
    groups = ("--method", "by-hand", "--groups", tmp_path / "groups.yaml")
    assert xelm("cluster", *groups, "--out", tmp_path / "clusters").code == 0
    assert xelm("branch", directory, "--clusters", tmp_path / "clusters").code == 0
    assert sorted(_background(open_run(directory), (), ()).trained["dense"]) == ["en", "es", "fr"]


def test_without_calibration_no_distribution_is_looked_at(xelm, copy):
    command = ("evaluate", copy.directory, "--corpus", copy.held_out, "--calibration-tokens", 0)
    rows = xelm(*command, "--json").json()["rows"]
    assert {row["calibration"] for row in rows} == {None}
    refused = xelm(*command[:-1], -1)
    assert refused.code == 2
    assert refused.err.strip() == "xelm: calibration_tokens must be at least 0; got -1"


def test_tables_tell_of_routers_calibration_and_forgetting(xelm, evaluated, tiny, copy):
    out = xelm("evaluate", copy.directory, "--corpus", copy.held_out).out
    tables = {table.split()[0]: table.splitlines() for table in out.split("\n\n")}
    record = json.loads((copy.directory / "results" / "results.json").read_text())
    found = {(each["system"], each["routing"]): each for each in record["summaries"]}
    learned = next(line for line in tables["router"] if line.startswith("by learned")).split()
    router = found["ensemble", "learned"]["router"]
    assert learned[2] == f"{router['accuracy']:.1%}" and learned[-1] == f"{router['regret']:+.3f}"
    seed = next(line for line in tables["mean"] if line.startswith("seed")).split()
    assert seed[1] == f"{found['seed', None]['bits_per_byte']['value']:.3f}"
    assert seed[-1] == f"{found['seed', None]['calibration']['brier']:.3f}"
    assert tables["bits/B"][0].split()[3:] == ["seed", *sorted(NAMES)]
    forgotten = next(line for line in tables["bits/B"] if line.startswith("forgotten")).split()
    wanted = [found[name, None]["forgetting"]["value"] for name in sorted(NAMES)]
    assert forgotten[1:] == [f"{value:+.3f}" for value in wanted]


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
    rows = {
        (r["system"], r["routing"], r["language"]): r
        for r in xelm(*command, "--json").json()["rows"]
    }
    systems = [("seed", None), ("dense", None), ("ensemble", "language")]
    own = {(name, None, tag) for name, languages in NAMES.items() for tag in languages}
    assert set(rows) == own | {(*system, tag) for system in systems for tag in LANGUAGES}
    for key, row in rows.items():
        assert row["nll"] == pytest.approx(evaluated[1][key]["nll"], rel=1e-6)
    assert xelm("report", copy.directory).code == 0
    page = (copy.directory / "results" / "report.html").read_text(encoding="utf-8")
    assert "Not every expert was scored on every language." in page
    assert "that expert is the best of all" not in page


@pytest.mark.slow
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
    options = EvaluationOptions(routings=routings, top_m=top_m)
    rows = evaluate(run, tiny.held_out, options, save=False).rows
    for routing in routings:
        ensemble = run.ensemble(routing, top_m=top_m)
        for language in LANGUAGES:
            texts = documents_of(tiny.held_out, language)
            (row,) = (r for r in rows if r.routing == routing and r.language == language)
            given = [language] * len(texts) if routing == "language" else None
            scores = ensemble.score(texts, given)
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
    assert set(first.json()["weights"]) == {*NAMES, "seed", "dense"}
    assert sum(first.json()["weights"].values()) == pytest.approx(1.0)
    plain = xelm(*command)
    assert plain.out == prompt + first.json()["text"] + "\n"
    assert plain.err.startswith("experts: ")
    hard = xelm(*command, "--json", "--routing", "language", "--language", "deu").json()
    assert hard["weights"] == {"en-es": 0.0, "de-fr": 1.0}


def test_tfidf_routing_sends_a_text_to_the_expert_of_its_language(tiny):
    ensemble = open_run(tiny.directory).ensemble(Routing(name="tfidf", temperature=0.02))
    for name, languages in NAMES.items():
        for language in languages:
            scores = ensemble.score(documents_of(tiny.held_out, language))
            assert scores.weights[name].mean() > 0.6


@pytest.mark.slow
def test_a_file_of_many_languages_is_measured_on_those_asked_for_each_time(xelm, copy, tmp_path):
    rows = [
        json.dumps({"text": text, "language": tag})
        for tag in ("de", "en")
        for text in documents_of(copy.held_out, tag)
    ]
    (tmp_path / "one.jsonl").write_text("\n".join(rows))
    command = ("evaluate", copy.directory, "--corpus", tmp_path / "one.jsonl")
    command += ("--routing", "language")
    results = copy.directory / "results"
    for options, wanted, kept in (
        (("--languages", "en"), ["en"], 0),
        ((), ["de", "en"], 1),
        (("--languages", "en,de"), ["de", "en"], 1),
        (("--languages", "de"), ["de"], 2),
    ):
        outcome = xelm(*command, *options)
        assert outcome.code == 0, outcome.err
        record = json.loads((results / "results.json").read_text())
        assert sorted({row["language"] for row in record["rows"]}) == wanted
        assert record["languages"] == wanted
        assert len(list(results.glob("results-*.json"))) == kept
