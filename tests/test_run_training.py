"""A RUN through the command line: init, branching and training, and what each leaves."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from shared import LANGUAGES, NAMES, documents_of, snapshot

from clustering.clustering import Clustering
from experts.registry import Registry
from xelm import open_run
from xelm.data import store_writer
from xelm.runs import publish, text
from xelm.runs.shares import dense_text, expert_text
from xelm.training.metrics import MetricsLog, read_metrics


def test_init_tells_what_it_read(tiny):
    run = open_run(tiny.directory)
    assert run.languages == LANGUAGES
    counts = run.store().record["languages"]
    for language in LANGUAGES:
        texts = documents_of(tiny.corpus, language)
        size = sum(len(text.encode()) for text in texts)
        assert counts[language]["documents"] == 60 and counts[language]["bytes"] == size
        tokens = sum(map(len, run.tokenizer().encode(texts)))
        (line,) = [
            line for line in tiny.outcomes["init"].out.splitlines() if line.startswith(language)
        ]
        assert line.split()[2:5] == ["60", f"{tokens:,}", f"{size:,}"]


def test_a_run_says_how_it_was_made(tiny):
    record = json.loads((tiny.directory / "run.json").read_text())
    assert record["format"] == 3
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
            patch.setattr(store_writer._LanguageWriter, "finish", interrupt)
        elif stage == "vectors":
            patch.setattr("clustering.tfidf.fit", interrupt)
        else:
            write = MetricsLog.write
            patch.setattr(
                MetricsLog, "write", lambda s, x: interrupt() if x["step"] == 11 else write(s, x)
            )
        assert xelm(*command).code == 130
    assert not (tmp_path / "RUN" / "registry.json").exists()
    # Where and how the seed's training runs may be another.
    done = xelm(*command, "--set", "seed.runtime.keep_checkpoints=3")
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


def test_vectors_are_fitted_on_as_many_documents_of_every_language(
    initialised, tmp_path, monkeypatch
):
    shutil.copytree(initialised[0], tmp_path / "RUN")
    (tmp_path / "RUN" / "vectoriser.npz").unlink()
    run, fit, heard = open_run(tmp_path / "RUN"), text.tfidf.fit, []

    def listen(documents, *arguments):
        heard.extend(documents)
        return fit(heard, *arguments)

    monkeypatch.setattr(text, "VECTORISER_DOCUMENTS", 8)
    monkeypatch.setattr(text.tfidf, "fit", listen)
    text.fit_vectoriser(run, run.store())
    wanted = [ids.document(n) for ids in run.store().languages.values() for n in (0, 30)]
    assert [list(document) for document in heard] == [list(document) for document in wanted]


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
        lines = map(str.split, tiny.outcomes["train"].out.splitlines())
        (line,) = [line for line in lines if line[0] == f"{expert.name}@v1"]
        assert line[1:4] == ["done", "100.0%", f"{expert.tokens:,}"]
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
    record["config"]["experts"]["data"]["sampling_exponent"] = exponent
    (tmp_path / "RUN" / "run.json").write_text(json.dumps(record))
    run = open_run(tmp_path / "RUN")
    whole = dense_text(run)
    tokens = {s.ids.language: int(s.ids.lengths[s.documents].sum()) for s in whole.sources}
    held_out = {s.ids.language: len(s.documents) for s in whole.held_out}
    assert held_out == dict.fromkeys(LANGUAGES, 8)
    total = sum(count**exponent for count in tokens.values())
    found = {
        source.ids.language: source.share
        for expert in run.registry().experts
        for source in expert_text(run, expert).sources
    }
    assert found == pytest.approx({tag: n**exponent / total for tag, n in tokens.items()})
    assert found == {s.ids.language: s.share for s in whole.sources}


@pytest.mark.slow
def test_clusters_that_leave_out_what_dense_was_trained_on_are_refused(
    xelm, initialised, tmp_path, undrawn
):
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

            patch.setattr(publish, patched, interrupt)
            outcome = xelm("train", tmp_path / "RUN", "de-fr")
        assert outcome.code == 130
        assert "run the same command again" in outcome.err
        assert open_run(tmp_path / "RUN").registry().published() == ()
    assert xelm("train", tmp_path / "RUN", "de-fr").code == 0
    path = Path("experts/de-fr/v1/model.safetensors")
    assert (tmp_path / "RUN" / path).read_bytes() == (tiny.directory / path).read_bytes()
    assert xelm("verify", tmp_path / "RUN").code == 0


@pytest.mark.parametrize(
    ("by", "code"), [(signal.SIGTERM, os.EX_TEMPFAIL), (signal.SIGINT, 130)], ids=str
)
def test_an_expert_that_is_asked_to_end_is_saved_and_the_launcher_told_to_try_again(
    xelm, initialised, tiny, tmp_path, by, code
):
    shutil.copytree(initialised[0], tmp_path / "RUN")
    xelm("branch", tmp_path / "RUN", "--clusters", tiny.clusters)
    write = MetricsLog.write
    with pytest.MonkeyPatch.context() as patch:

        def ask(self, line):
            write(self, line)
            if line["step"] == 5:  # between two checkpoints
                os.kill(os.getpid(), by)

        patch.setattr(MetricsLog, "write", ask)
        outcome = xelm("train", tmp_path / "RUN", "de-fr")
    assert outcome.code == code
    said = "xelm: de-fr was stopped by a signal; it is saved, and resumes when run again"
    assert outcome.err.splitlines()[-1] == said
    outcome = xelm("train", tmp_path / "RUN", "de-fr")
    assert outcome.code == 0 and "resumes after step 6" in outcome.err
    path = Path("experts/de-fr/v1/model.safetensors")
    assert (tmp_path / "RUN" / path).read_bytes() == (tiny.directory / path).read_bytes()


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
    for expert in by_document.registry().experts:
        text = expert_text(by_document, expert)
        for source in [*text.sources, *text.held_out]:
            seen.setdefault(source.ids.language, []).extend(source.documents.tolist())
    assert {tag: sorted(found) for tag, found in seen.items()} == {
        tag: list(range(60)) for tag in LANGUAGES
    }


def test_shares_of_clusters_of_documents_add_up_to_one(by_document):
    shares = [
        source.share
        for expert in by_document.registry().experts
        for source in expert_text(by_document, expert).sources
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
