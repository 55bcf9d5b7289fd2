"""The whole path through the command line: what each command promises about the RUN it leaves."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from clustering.clustering import Clustering
from experts.lock import update
from experts.registry import Registry
from xelm import load_model, open_run
from xelm.data import store as stores
from xelm.models import checkpoint
from xelm.runs import init, training
from xelm.runs.evaluation import evaluate
from xelm.training.metrics import MetricsLog, read_metrics

LANGUAGES = ("en", "de", "es", "fr")
NAMES = {"en-es": ("en", "es"), "de-fr": ("de", "fr")}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".locks" not in path.parts
    }


def documents_of(corpus: Path, language: str) -> list[str]:
    lines = (corpus / f"{language}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


# Init


def test_init_tells_what_it_read(tiny):
    run = open_run(tiny.directory)
    assert run.languages == LANGUAGES
    counts = run.store().record["languages"]
    for language in LANGUAGES:
        texts = documents_of(tiny.corpus, language)
        size = sum(len(text.encode()) for text in texts)
        assert counts[language]["documents"] == 60 and counts[language]["bytes"] == size
        tokens = sum(map(len, run.tokenizer().encode(texts)))
        assert f"{language:10}{60:>12,}{tokens:>14,}{size:>14,}\n" in tiny.outcomes["init"].out


def test_a_run_says_how_it_was_made(tiny):
    record = json.loads((tiny.directory / "run.json").read_text())
    assert record["format"] == 1
    assert record["corpus"] == str(tiny.corpus)
    assert record["config"]["experts"]["tokens"] == 4096
    assert open_run(tiny.directory).config.model.vocabulary_size == 384
    assert not list(tiny.directory.rglob("*.partial"))


def test_the_seed_was_trained(tiny):
    metrics = read_metrics(tiny.directory / "seed" / "metrics.jsonl")
    assert metrics[-1]["step"] == 2048 // 128
    assert metrics[0]["loss"] == pytest.approx(math.log(384), abs=0.1)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.2


@pytest.mark.parametrize("stage", ["tokenise", "seed", "vectors"])
def test_an_interrupted_init_goes_on_to_the_same_run(
    xelm, initialised, tiny_settings, tmp_path, stage
):
    corpus = json.loads((initialised[0] / "run.json").read_text())["corpus"]
    command = ["init", tmp_path / "RUN", "--corpus", corpus, "--languages", ",".join(LANGUAGES)]
    command += tiny_settings()

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        if stage == "tokenise":
            patch.setattr(stores._Writer, "finish", interrupt)
        elif stage == "vectors":
            patch.setattr("clustering.tfidf.fit", interrupt)
        else:
            write = MetricsLog.write
            patch.setattr(
                MetricsLog, "write", lambda s, x: interrupt() if x["step"] == 11 else write(s, x)
            )
        assert xelm(*command).code == 130
    assert not (tmp_path / "RUN" / "registry.json").exists()
    done = xelm(*command)
    assert done.code == 0, done.err
    wanted, found = snapshot(initialised[0]), snapshot(tmp_path / "RUN")
    # These hold the command line, the speed of the training, and their hashes.
    differ = {name for name in wanted if found.get(name) != wanted[name]}
    assert differ <= {"run.json", "registry.json", "seed/metrics.jsonl"}
    assert found.keys() == wanted.keys()
    assert open_run(tmp_path / "RUN").registry().seed_sha256.keys() == (
        open_run(initialised[0]).registry().seed_sha256.keys()
    )


def test_a_run_can_start_from_the_seed_of_another(xelm, tiny, tiny_settings, tmp_path):
    """And takes over its tokenised corpus and vectors, which it may never change."""
    before = snapshot(tiny.directory)
    languages = ",".join(LANGUAGES)
    command = ["init", tmp_path / "RUN", "--corpus", tiny.corpus, "--languages", languages]
    command += ["--seed", tiny.directory / "seed", "--preset", "hub"]
    command += ["--set", "vectoriser_dimensions=12", "--clusters", tiny.clusters]
    for part in ("experts", "grow"):
        command += ["--set", f"{part}.sequence_length=32"]
    assert xelm(*command).code == 0
    run, other = open_run(tmp_path / "RUN"), open_run(tiny.directory)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (run.seed / name).read_bytes() == (other.seed / name).read_bytes()
    assert run.vectoriser() == other.vectoriser()
    assert {e.name: e.languages for e in run.registry().training()} == NAMES
    assert snapshot(tiny.directory) == before


# Clusters, branches, training


def test_clustering_leaves_clusters_and_figures(tiny):
    clustering = Clustering.load(tiny.clusters)
    assert clustering.clusters == NAMES
    for name in ("tree.png", "distances.png"):
        assert (tiny.clusters / name).read_bytes().startswith(b"\x89PNG")
    assert "typology: 4 languages, 2 clusters of languages" in tiny.outcomes["cluster"].out


def test_branching_records_an_expert_in_training_for_each_cluster(tiny):
    assert tiny.outcomes["branch"].out.splitlines() == [
        f"{name:20}training    {' '.join(languages)}" for name, languages in NAMES.items()
    ]
    assert open_run(tiny.directory).clusters() == Clustering.load(tiny.clusters)


def test_experts_are_published_with_what_they_saw(tiny):
    registry = open_run(tiny.directory).registry()
    assert {e.name: e.languages for e in registry.published()} == NAMES
    for expert in registry.published():
        metrics = read_metrics(expert.directory(tiny.directory) / "metrics.jsonl")
        assert (
            expert.tokens == metrics[-1]["tokens"] == sum(metrics[-1]["language_tokens"].values())
        )
        assert (expert.parent, expert.round, expert.version) == ("seed", 1, 1)
        assert f"{expert.name:20}published   v1  {expert.tokens:,} tokens" in (
            tiny.outcomes["train"].out
        )
    assert sorted(path.name for path in (tiny.directory / "train").iterdir()) in (
        ["dense", "tokenizer"],
        ["tokenizer"],
    )


def test_the_budgets_of_the_experts_add_up_to_that_of_the_dense_baseline(tiny):
    dense = read_metrics(tiny.directory / "dense" / "metrics.jsonl")[-1]
    experts = [
        read_metrics(e.directory(tiny.directory) / "metrics.jsonl")[-1]
        for e in open_run(tiny.directory).registry().published()
    ]
    assert dense["step"] == sum(expert["step"] for expert in experts) == 4096 // 128
    # Every language is seen as often by its expert as by the baseline.
    seen = {tag: count for e in experts for tag, count in e["language_tokens"].items()}
    for language, count in dense["language_tokens"].items():
        assert seen[language] == pytest.approx(count, rel=0.02)


def test_dense_and_experts_are_trained_with_rates_of_their_own(tiny):
    run = open_run(tiny.directory)
    folders = {e.name: e.directory(run.directory) for e in run.registry().published()}
    peaks = {
        name: max(line["learning_rate"] for line in read_metrics(folder / "metrics.jsonl"))
        for name, folder in {"dense": run.dense, **folders}.items()
    }
    assert peaks == pytest.approx({"dense": 1e-3} | dict.fromkeys(folders, 5e-4), rel=0.05)


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
def test_shares_of_clusters_are_parts_of_one_whole(tiny, tmp_path, exponent):
    shutil.copytree(tiny.directory, tmp_path / "RUN")
    record = json.loads((tmp_path / "RUN" / "run.json").read_text())
    record["config"]["experts"]["sampling_exponent"] = exponent
    (tmp_path / "RUN" / "run.json").write_text(json.dumps(record))
    run = open_run(tmp_path / "RUN")
    tokens = {tag: len(ids.ids) for tag, ids in run.store().languages.items()}
    total = sum(count**exponent for count in tokens.values())
    found = {
        source.ids.language: source.share
        for name in run.clusters().clusters
        for source in training.cluster_sources(run, name)
    }
    assert found == pytest.approx({tag: n**exponent / total for tag, n in tokens.items()})
    assert found == {s.ids.language: s.share for s in training.dense_sources(run)}


def test_clusters_that_leave_out_what_dense_was_trained_on_are_refused(xelm, initialised, tmp_path):
    shutil.copytree(initialised[0], tmp_path / "RUN")
    languages = ("--languages", ",".join(LANGUAGES), "--exclude", "fr")
    xelm("cluster", "-k", 1, *languages, "--out", tmp_path / "clusters")
    assert xelm("train", tmp_path / "RUN", "--dense").code == 0
    outcome = xelm("branch", tmp_path / "RUN", "--clusters", tmp_path / "clusters")
    assert outcome.code == 2
    assert "leave out fr, on which the dense baseline was trained" in outcome.err
    assert Registry.load(tmp_path / "RUN").experts == ()
    # The other way round dense leaves them out too, and branching again is no mistake.
    shutil.rmtree(tmp_path / "RUN")
    shutil.copytree(initialised[0], tmp_path / "RUN")
    branch = ("branch", tmp_path / "RUN", "--clusters", tmp_path / "clusters")
    for command in (branch, ("train", tmp_path / "RUN", "--dense"), branch):
        assert xelm(*command).code == 0
    seen = read_metrics(tmp_path / "RUN" / "dense" / "metrics.jsonl")[-1]["language_tokens"]
    assert set(seen) == set(LANGUAGES) - {"fr"}


def test_repeated_commands_change_nothing(xelm, copy, tiny_settings):
    before = snapshot(copy.directory)
    init = ("init", copy.directory, "--corpus", copy.corpus, "--languages", ",".join(LANGUAGES))
    commands = [
        (*init, *tiny_settings()),
        ("branch", copy.directory, "--clusters", copy.clusters),
        ("train", copy.directory, "--all", "--dense"),
        ("train", copy.directory, "de-fr"),
        ("verify", copy.directory),
    ]
    for command in commands:
        outcome = xelm(*command)
        assert outcome.code == 0, outcome.err
        assert snapshot(copy.directory) == before, command[0]


def test_an_expert_can_be_trained_alone_and_others_later(xelm, initialised, tiny, tmp_path):
    shutil.copytree(initialised[0], tmp_path / "RUN")
    run = open_run(tmp_path / "RUN")
    xelm("branch", run.directory, "--clusters", tiny.clusters)
    run.train("de-fr")
    assert [e.name for e in run.registry().published()] == ["de-fr"]
    assert xelm("train", run.directory, "--all").code == 0
    for name in NAMES:
        path = Path("experts") / name / "v1" / "model.safetensors"
        assert (run.directory / path).read_bytes() == (tiny.directory / path).read_bytes()
    assert not run.dense.exists()


def test_an_expert_interrupted_while_training_ends_with_the_same_weights(
    xelm, initialised, tiny, tmp_path
):
    shutil.copytree(initialised[0], tmp_path / "RUN")
    xelm("branch", tmp_path / "RUN", "--clusters", tiny.clusters)
    for patched in ("write_checkpoint", "hash_directory", "update"):
        with pytest.MonkeyPatch.context() as patch:

            def interrupt(*arguments, **options):
                raise KeyboardInterrupt

            patch.setattr(training, patched, interrupt)
            outcome = xelm("train", tmp_path / "RUN", "de-fr")
        assert outcome.code == 130
        assert "run the same command again" in outcome.err
        assert open_run(tmp_path / "RUN").registry().published() == ()
    assert xelm("train", tmp_path / "RUN", "de-fr").code == 0
    path = Path("experts/de-fr/v1/model.safetensors")
    assert (tmp_path / "RUN" / path).read_bytes() == (tiny.directory / path).read_bytes()
    assert xelm("verify", tmp_path / "RUN").code == 0


# Growing


@pytest.fixture(scope="module")
def grown(xelm, tiny, tmp_path_factory):
    """The tiny RUN with Portuguese, and what `grow` said."""
    directory = tmp_path_factory.mktemp("grown") / "RUN"
    shutil.copytree(tiny.directory, directory)
    outcome = xelm("grow", directory, "--language", "por", "--corpus", tiny.corpus)
    assert outcome.code == 0, outcome.err
    return directory, outcome


def test_growing_leaves_every_other_file_as_it_was(grown, tiny):
    before, after = snapshot(tiny.directory), snapshot(grown[0])
    assert {name for name in after if after[name] != before.get(name)} == {
        "registry.json",
        *(name for name in after if name.startswith(("experts/pt/v1/", "corpus/pt/"))),
    }
    assert before.keys() <= after.keys()
    assert {"experts/pt/v1/model.safetensors", "experts/pt/v1/CARD.md"} <= after.keys()


def test_the_child_starts_from_the_nearest_relative_a_round_later(grown, tiny):
    registry = Registry.load(grown[0])
    child = registry.expert("pt")
    assert child.languages == ("pt",) and child.cluster is None and child.round == 2
    parent = registry.expert(child.parent.partition("@")[0])
    assert "es" in parent.languages  # of en, de, es and fr, the nearest to Portuguese
    assert grown[1].out == (f"pt@v1 from {parent.reference}, round 2, {child.tokens:,} tokens\n")
    card = (grown[0] / child.path / "CARD.md").read_text()
    assert "serves es, the nearest language" in card
    assert {e.reference: e for e in Registry.load(tiny.directory).experts} == {
        e.reference: e for e in registry.experts if e.name != "pt"
    }


def test_the_child_sees_the_donors_in_their_share(grown):
    run = open_run(grown[0])
    child = run.registry().expert("pt")
    metrics = read_metrics(child.directory(run.directory) / "metrics.jsonl")
    assert metrics[-1]["step"] == 1024 // 128
    seen = metrics[-1]["language_tokens"]
    donors = run.registry().expert(child.parent.partition("@")[0]).languages
    assert set(seen) == {"pt", *donors}
    share = run.config.donor_share
    assert seen["pt"] / child.tokens == pytest.approx(1 - share, abs=0.03)
    for language in donors:
        assert seen[language] / child.tokens == pytest.approx(share / len(donors), abs=0.03)


def test_the_child_began_where_its_parent_ended(grown):
    """One short training moves weights by at most the sum of its rates."""
    run = open_run(grown[0])
    child = run.registry().expert("pt")
    parent = run.registry().expert(child.parent.partition("@")[0])
    weights = [load_file(e.directory(run.directory) / "model.safetensors") for e in (child, parent)]
    seed = load_file(run.seed / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert (
        np.abs(weights[0][name] - weights[1][name]).max()
        < np.abs(weights[0][name] - seed[name]).max()
    )
    metrics = read_metrics(child.directory(run.directory) / "metrics.jsonl")
    assert metrics[0]["loss"] < math.log(384) - 0.3


def test_growing_again_is_refused_and_changes_nothing(xelm, grown):
    before = snapshot(grown[0])
    outcome = xelm("grow", grown[0], "--language", "pt")
    assert (outcome.code, outcome.err) == (2, "xelm: 'pt' is served already, by pt@v1\n")
    assert snapshot(grown[0]) == before


def test_an_interrupted_growing_goes_on_to_the_same_child(xelm, grown, copy):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    command = ("grow", copy.directory, "--language", "pt", "--corpus", copy.corpus)
    with pytest.MonkeyPatch.context() as patch:
        write = MetricsLog.write
        patch.setattr(
            MetricsLog, "write", lambda s, x: interrupt() if x["step"] == 6 else write(s, x)
        )
        assert xelm(*command).code == 130
    assert "pt" in [e.name for e in Registry.load(copy.directory).training()]
    other = xelm(*command, "--parent", "de-fr")
    assert other.code == 2 and "pt@v1 is in training already, from en-es@v1" in other.err
    done = xelm(*command)
    assert done.out == grown[1].out
    for name in ("model.safetensors", "centre.npz", "config.json"):
        path = Path("experts/pt/v1") / name
        assert (copy.directory / path).read_bytes() == (grown[0] / path).read_bytes()
    assert (
        "serves es, the nearest language" in (copy.directory / "experts/pt/v1/CARD.md").read_text()
    )


def test_a_language_without_typology_grows_from_the_parent_that_is_named(xelm, copy, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    shutil.copy(copy.corpus / "pt.jsonl", corpus / "tlh.jsonl")
    command = ("grow", copy.directory, "--language", "tlh", "--corpus", corpus)
    refused = xelm(*command)
    assert refused.code == 2
    assert refused.err.splitlines()[-1].endswith("; name an expert to grow from with --parent")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", full)
        assert xelm(*command, "--parent", "de-fr").code == 2
    # Begun with that parent, it goes on without its name.
    done = xelm(*command)
    assert done.out.startswith("tlh@v1 from de-fr@v1, round 2"), done.err
    card = (copy.directory / "experts/tlh/v1/CARD.md").read_text()
    assert "named by hand, or the nearest before other experts joined" in card


def test_a_cluster_in_training_is_not_taken_for_a_child(xelm, initialised, tiny, tmp_path):
    """A cluster of one language bears its name, as a grown expert would."""
    shutil.copytree(initialised[0], tmp_path / "RUN")
    xelm("cluster", "-k", 4, "--languages", ",".join(LANGUAGES), "--out", tmp_path / "clusters")
    xelm("branch", tmp_path / "RUN", "--clusters", tmp_path / "clusters")
    assert xelm("train", tmp_path / "RUN", "en").code == 0
    before = snapshot(tmp_path / "RUN")
    outcome = xelm("grow", tmp_path / "RUN", "--language", "de", "--corpus", tiny.corpus)
    assert outcome.code == 2
    assert "'de' is served already, by de@v1 (training)" in outcome.err
    assert snapshot(tmp_path / "RUN") == before


# Asking


@pytest.fixture(scope="module")
def evaluated(xelm, tiny, tmp_path_factory):
    """The tiny RUN with results, and the rows that were printed."""
    directory = tmp_path_factory.mktemp("evaluated") / "RUN"
    shutil.copytree(tiny.directory, directory)
    rows = xelm("evaluate", directory, "--corpus", tiny.held_out, "--json").json()
    return directory, {(row["system"], row["routing"], row["language"]): row for row in rows}


def test_every_system_is_evaluated_on_every_language(evaluated):
    systems = [("seed", None), ("dense", None), ("en-es", None), ("de-fr", None)]
    systems += [("ensemble", name) for name in ("language", "tfidf", "uniform", "posterior")]
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


# Checkpoints


def test_exported_experts_load_in_transformers_with_the_same_logits(grown):
    run = open_run(grown[0])
    tokens = np.random.default_rng(0).integers(4, 384, (2, 30))
    for expert in run.registry().published():
        directory = expert.directory(run.directory)
        reference = AutoModelForCausalLM.from_pretrained(directory).eval()
        with torch.no_grad():
            wanted = reference(torch.tensor(tokens)).logits.numpy()
        logits = load_model(directory)(jnp.asarray(tokens))
        np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=1e-4)
        assert (
            AutoTokenizer.from_pretrained(directory)("ab")["input_ids"]
            == (AutoTokenizer.from_pretrained(run.seed)("ab")["input_ids"])
        )


def test_merging_averages_the_published_experts(xelm, tiny, tmp_path):
    outcome = xelm("merge", tiny.directory, "--out", tmp_path / "merged")
    assert (outcome.code, outcome.out) == (0, f"{tmp_path / 'merged'}\n")
    experts = [load_file(tiny.directory / f"experts/{name}/v1/model.safetensors") for name in NAMES]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in merged.items():
        wanted = (experts[0][name].astype(np.float64) + experts[1][name]) / 2
        np.testing.assert_array_equal(tensor, wanted.astype(np.float32))
    assert load_model(tmp_path / "merged").config == load_model(tiny.directory / "seed").config
    again = xelm("merge", tiny.directory, "en-es", "--out", tmp_path / "merged")
    assert again.code == 2 and "nothing is overwritten" in again.err


def test_verify_finds_one_changed_byte(xelm, copy):
    fine = xelm("verify", copy.directory)
    assert fine.code == 0 and "is as published" in fine.out
    path = copy.directory / "experts/de-fr/v1/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    outcome = xelm("verify", copy.directory)
    assert outcome.code == 2 and outcome.out == ""
    assert "changed: experts/de-fr/v1/model.safetensors: wanted sha256" in outcome.err
    faults = xelm("verify", copy.directory, "--json")
    assert faults.code == 2 and len(json.loads(faults.out)) == 1


def test_rolling_back_publishes_the_earlier_version_and_touches_no_weights(xelm, copy):
    update(copy.directory, lambda registry: registry.start("de-fr", parent="de-fr@v1"))
    assert xelm("train", copy.directory, "de-fr").code == 0
    before = snapshot(copy.directory)
    registry = Registry.load(copy.directory)
    assert [(e.version, e.status) for e in registry.versions("de-fr")] == [
        (1, "retired"),
        (2, "published"),
    ]
    outcome = xelm("rollback", copy.directory, "de-fr")
    assert (outcome.code, outcome.out) == (0, "published: de-fr@v1\n")
    after = snapshot(copy.directory)
    assert {name for name in after if after[name] != before[name]} == {"registry.json"}
    assert xelm("rollback", copy.directory, "de-fr", "--version", 2).out == "published: de-fr@v2\n"
    assert snapshot(copy.directory) == before
    assert xelm("verify", copy.directory).code == 0


# Clusters of documents


@pytest.fixture(scope="module")
def by_document(xelm, initialised, tmp_path_factory):
    """A RUN branched on two clusters of documents, and trained."""
    directory = tmp_path_factory.mktemp("by-document") / "RUN"
    shutil.copytree(initialised[0], directory)
    clusters = directory.with_name("clusters")
    for command in (
        ("cluster", "--method", "tfidf", "-k", 2, "--run", directory, "--out", clusters),
        ("branch", directory, "--clusters", clusters),
        ("train", directory, "--all"),
    ):
        outcome = xelm(*command)
        assert outcome.code == 0, outcome.err
    return open_run(directory)


def test_clusters_partition_the_documents(by_document):
    seen: dict[str, list[int]] = {}
    for name in by_document.clusters().clusters:
        for source in training.cluster_sources(by_document, name):
            seen.setdefault(source.ids.language, []).extend(source.documents.tolist())
    assert {tag: sorted(found) for tag, found in seen.items()} == {
        tag: list(range(60)) for tag in LANGUAGES
    }


def test_shares_of_clusters_of_documents_add_up_to_one(by_document):
    shares = [
        source.share
        for name in by_document.clusters().clusters
        for source in training.cluster_sources(by_document, name)
    ]
    assert sum(shares) == pytest.approx(1.0)
    assert min(shares) > 0


def test_documents_go_to_the_nearest_centre(by_document):
    clustering = by_document.clusters()
    vectoriser = by_document.vectoriser()
    for tag, ids in by_document.store().languages.items():
        vectors = vectoriser.transform(ids.document(n) for n in range(len(ids)))
        distances = ((vectors[:, None] - clustering.centres[None]) ** 2).sum(axis=2)
        counts = np.bincount(distances.argmin(axis=1), minlength=2)
        for name, count in zip(clustering.clusters, counts):
            assert clustering.documents[name].get(tag, 0) == count


def test_experts_of_documents_are_trained_on_them_and_serve_every_language_once(by_document):
    published = by_document.registry().published()
    assert [expert.name for expert in published] == ["c0", "c1"]
    assert sorted(tag for expert in published for tag in expert.languages) == sorted(LANGUAGES)
    steps = 0
    for expert in published:
        metrics = read_metrics(expert.directory(by_document.directory) / "metrics.jsonl")
        assert set(metrics[-1]["language_tokens"]) == set(expert.documents)
        steps += metrics[-1]["step"]
    assert abs(steps - 4096 // 128) <= 1  # rounded for each expert
    assert by_document.ensemble("tfidf").score(["abc"]).nats.shape == (1,)


# A full disk


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fails", ["save_file", "flush"])
def test_a_full_disk_leaves_no_half_expert(xelm, initialised, tiny, tmp_path, fails):
    shutil.copytree(initialised[0], tmp_path / "RUN")
    xelm("branch", tmp_path / "RUN", "--clusters", tiny.clusters)
    command = ("train", tmp_path / "RUN", "de-fr")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, fails, full)
        outcome = xelm(*command)
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]
    target = tmp_path / "RUN" / "experts" / "de-fr" / "v1"
    assert last == f"xelm: cannot write {target}: No space left on device; nothing was changed"
    assert not list((tmp_path / "RUN" / "experts").rglob("*")) or not list(
        (tmp_path / "RUN" / "experts" / "de-fr").iterdir()
    )
    assert Registry.load(tmp_path / "RUN").published() == ()
    # With room again, the training is not done again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", full)
        assert xelm(*command).code == 0
    path = Path("experts/de-fr/v1/model.safetensors")
    assert (tmp_path / "RUN" / path).read_bytes() == (tiny.directory / path).read_bytes()


def test_a_full_disk_leaves_the_registry_as_it_was(xelm, copy):
    update(copy.directory, lambda registry: registry.start("de-fr", parent="de-fr@v1"))
    assert xelm("train", copy.directory, "de-fr").code == 0
    before = snapshot(copy.directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        outcome = xelm("rollback", copy.directory, "de-fr")
    assert outcome.code == 2
    assert outcome.err == (
        f"xelm: {copy.directory / 'registry.json'} was not written: the disk is full; "
        "nothing was changed\n"
    )
    assert snapshot(copy.directory) == before


def test_a_full_disk_leaves_no_half_corpus_and_no_half_results(xelm, copy):
    before = snapshot(copy.directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores._Writer, "add", full)
        outcome = xelm("evaluate", copy.directory, "--corpus", copy.held_out)
    assert outcome.code == 2
    assert "cannot write" in outcome.err and str(copy.directory / "corpus") in outcome.err
    assert snapshot(copy.directory) == before


def test_a_full_disk_while_merging_leaves_nothing(xelm, tiny, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        outcome = xelm("merge", tiny.directory, "--out", tmp_path / "merged")
    assert outcome.code == 2
    assert str(tmp_path / "merged") in outcome.err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_weights_are_read_as_safetensors_alone(tiny):
    for path in [*tiny.directory.rglob("*.safetensors")]:
        with safetensors.safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
    suffixes = {path.suffix for path in tiny.directory.rglob("*") if path.is_file()}
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth", ".bin", ".py"}


def test_vectors_are_fitted_on_as_many_documents_of_every_language(
    initialised, tmp_path, monkeypatch
):
    shutil.copytree(initialised[0], tmp_path / "RUN")
    (tmp_path / "RUN" / "vectoriser.npz").unlink()
    run, fit, heard = open_run(tmp_path / "RUN"), init.tfidf.fit, []

    def listen(documents, *arguments):
        heard.extend(documents)
        return fit(heard, *arguments)

    monkeypatch.setattr(init, "VECTORISER_DOCUMENTS", 8)
    monkeypatch.setattr(init.tfidf, "fit", listen)
    init._fit_vectoriser(run, run.store())
    wanted = [ids.document(n) for ids in run.store().languages.values() for n in (0, 30)]
    assert [list(document) for document in heard] == [list(document) for document in wanted]
