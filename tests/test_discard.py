"""`xelm discard`: what is in training can be given up, and nothing else."""

import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
from conftest import write_corpus

from clustering.errors import UserError
from experts.expert import Expert
from experts.lock import locked, update
from experts.registry import Registry
from experts.verify import hash_directory
from xelm.runs.run import open_run
from xelm.training.metrics import MetricsLog


@pytest.fixture
def growing_wrongly(xelm, copy, tmp_path):
    """A RUN whose grown expert was interrupted on a wrong corpus, and the right corpus."""
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.mkdir(), wrong.mkdir()
    shutil.copy(copy.corpus / "pt.jsonl", right)
    write_corpus(tmp_path / "other", ["nl"], documents=60, seed=0)
    shutil.copy(tmp_path / "other" / "nl.jsonl", wrong / "pt.jsonl")
    write = MetricsLog.write
    with pytest.MonkeyPatch.context() as patch:

        def stop(self, line):
            write(self, line)
            if line["step"] == 5:
                raise KeyboardInterrupt

        patch.setattr(MetricsLog, "write", stop)
        outcome = xelm(
            *("grow", copy.directory, "--language", "pt", "--corpus", wrong, "--parent", "en-es")
        )
    assert outcome.code == 130
    return copy.directory, right


def test_a_wrong_corpus_is_given_up_and_the_right_one_gives_what_it_would_have(
    xelm, tiny, growing_wrongly, tmp_path
):
    run, right = growing_wrongly
    grow = ("grow", run, "--language", "pt", "--corpus", right, "--parent", "en-es")
    refused = xelm(*grow)
    assert refused.code == 2 and f"give it up with: xelm discard {run} pt" in refused.err
    outcome = xelm("discard", run, "pt")
    assert (outcome.code, outcome.out) == (
        0,
        "discarded: pt@v1, its checkpoints and its record\n",
    )
    for left in ("train/pt", "corpus/pt", "experts/pt"):
        assert (
            not (run / left / "checkpoints").exists() and not (run / left / "store.json").exists()
        )
    before, after = (open_run(r).registry() for r in (tiny.directory, run))
    assert [event.action for event in after.history[len(before.history) :]] == ["grow", "discard"]
    assert replace(after, history=before.history) == before
    assert xelm(*grow).code == 0
    shutil.copytree(tiny.directory, tmp_path / "straight")
    assert xelm("grow", tmp_path / "straight", *grow[2:]).code == 0
    path = "experts/pt/v1/model.safetensors"
    assert (run / path).read_bytes() == (tmp_path / "straight" / path).read_bytes()


def test_a_branched_expert_stays_and_begins_anew(xelm, initialised, tiny, tmp_path):
    run = tmp_path / "RUN"
    shutil.copytree(initialised[0], run)
    xelm("branch", run, "--clusters", tiny.clusters)
    registry = (run / "registry.json").read_bytes()
    (run / "train/de-fr/checkpoints").mkdir(parents=True)
    (run / "train/de-fr.failed.txt").write_text("its text is gone")
    outcome = xelm("discard", run, "de-fr", "--json")
    assert outcome.json() == {"name": "de-fr", "removed": None}
    assert (run / "registry.json").read_bytes() == registry
    assert not (run / "train/de-fr").exists() and not (run / "train/de-fr.failed.txt").exists()


def test_the_dense_baseline_may_be_given_up_while_it_is_in_training(xelm, initialised, tmp_path):
    run = tmp_path / "RUN"
    shutil.copytree(initialised[0], run)
    (run / "train/dense/checkpoints").mkdir(parents=True)
    assert xelm("discard", run, "dense").code == 0
    assert not (run / "train/dense").exists()
    assert "not in training" in xelm("discard", run, "dense").err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("en-es", "expert 'en-es' is not in training; it has v1 (published)"),
        ("nl", "there is no expert 'nl'; known: de-fr, en-es"),
        ("dense", "is trained to the end"),
    ],
)
def test_what_is_published_cannot_be_discarded(xelm, tiny, name, said):
    before = (tiny.directory / "registry.json").read_bytes()
    outcome = xelm("discard", tiny.directory, name)
    assert outcome.code == 2 and said in outcome.err
    assert (tiny.directory / "registry.json").read_bytes() == before


def test_what_another_process_trains_is_left_alone(xelm, growing_wrongly):
    run, _ = growing_wrongly
    with locked(run, "train-pt"):
        outcome = xelm("discard", run, "pt")
    assert outcome.code == 2 and "is in use (train-pt) by process" in outcome.err
    assert (run / "train/pt/checkpoints").exists()
    assert [e.name for e in open_run(run).registry().training()] == ["pt"]


def test_what_is_published_before_the_lock_is_free_is_left_alone(
    xelm, growing_wrongly, monkeypatch
):
    """The trainer publishes between the command's start and the moment that it has the lock."""
    run, _ = growing_wrongly
    weights = run / "experts/pt/v1/model.safetensors"

    @contextmanager
    def published_meanwhile(*arguments, **options):
        weights.parent.mkdir(parents=True)
        weights.write_text("weights")
        sha256 = hash_directory(weights.parent)
        update(run, lambda registry: registry.publish("pt", 1, sha256=sha256, tokens=1), "publish")
        with locked(*arguments, **options):
            yield

    monkeypatch.setattr("xelm.runs.discard.locked", published_meanwhile)
    outcome = xelm("discard", run, "pt")
    assert outcome.code == 2
    assert "expert 'pt' is not in training; it has v1 (published)" in outcome.err
    assert weights.read_text() == "weights" and (run / "corpus/pt/store.json").exists()


def test_the_text_of_a_growth_that_never_reached_the_registry_is_deleted(xelm, copy, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    run = copy.directory
    before = {path.name for path in (run / "corpus").iterdir()}  # other tests may have evaluated
    with monkeypatch.context() as patch:
        patch.setattr("xelm.runs.grow.update", interrupt)
        grow = ("grow", run, "--language", "pt", "--corpus", copy.corpus, "--parent", "en-es")
        assert xelm(*grow).code == 130
    assert (run / "corpus/pt/store.json").exists()
    (run / "corpus/.pt.partial").mkdir()
    outcome = xelm("discard", run, "pt")
    assert (outcome.code, outcome.out) == (
        0,
        f"discarded: {run / 'corpus/pt'}, the text of an expert whose training had not begun\n",
    )
    assert {path.name for path in (run / "corpus").iterdir()} == before
    (run / "corpus/evaluation-a").mkdir()
    for name in ("pt", "train", "evaluation-a", "de", ".", ".."):
        assert xelm("discard", run, name).code == 2
    assert (run / "corpus/train/store.json").exists() and (run / "corpus/evaluation-a").exists()


def test_only_the_unfinished_version_leaves_the_registry():
    hashes = {"model.safetensors": "a" * 64}
    one = Expert(name="a", languages=("en",), status="published", sha256=hashes)
    registry = Registry(seed_sha256={}, experts=(one,))
    assert registry.start("a").discard("a") == registry
    with pytest.raises(UserError, match=r"not in training; it has v1 \(published\)"):
        registry.discard("a")
