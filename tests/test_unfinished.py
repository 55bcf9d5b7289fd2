"""Unfinished trainings: the same bits after a crash, whatever happened to their checkpoints."""

import errno
import gc
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from small_training import (
    CONFIG,
    SOURCES,
    Interrupt,
    assert_same_bits,
    assert_same_lines,
    interrupt_at,
)

from clustering.errors import UserError
from xelm.settings import vary
from xelm.training import checkpoint, preemption, trainer
from xelm.training.metrics import MetricsLog
from xelm.training.preemption import Preempted

UNRAISABLE = "ignore::pytest.PytestUnraisableExceptionWarning"


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture
def collected():
    """Readers of damaged checkpoints leave futures to a loop that has ended, and say so when they
    are collected: here, and not in another test."""
    yield
    gc.collect()


@pytest.mark.parametrize("steps", [(7,), *slow((3,), (12,), (8, 9, 20))])
def test_resumed_equals_uninterrupted_bit_for_bit(trained, steps):
    whole, metrics = trained(folder="whole")
    for step in steps:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
            interrupt_at(patch, step)
            trained(folder="resumed")
    resumed, other = trained(folder="resumed")
    assert_same_bits(resumed, whole)
    assert_same_lines(other, metrics)


def test_a_resumed_training_goes_on_from_its_checkpoint(trained, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 15)
        trained()
    # A line that the crash cut short.
    with (tmp_path / "training" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "los')
    begun = []
    batches = trainer.batches
    monkeypatch.setattr(
        trainer, "batches", lambda *a, **k: begun.append(k["first_step"]) or batches(*a, **k)
    )
    _, metrics = trained()
    assert begun == [12]
    assert [line["step"] for line in metrics] == list(range(1, 21))


def test_facts_may_be_changed_once_their_checkpoint_is_saved(tmp_path, monkeypatch):
    """The checkpoint is written in the background, later than they are hashed."""
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    facts, state = {"measurements": [1]}, {"weight": jax.device_put(jnp.ones(3), place)}
    save = ocp.CheckpointManager.save

    def later(manager, *arguments, **options):
        facts["measurements"].append(2)
        return save(manager, *arguments, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", later)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, state, facts)
    checkpoints.wait()
    restored, found = checkpoints.restore(1, lambda facts: state)
    checkpoints.close()
    assert found["measurements"] == [1] and restored["weight"].tolist() == [1.0, 1.0, 1.0]


def test_a_finished_training_run_again_gives_the_same_at_once(trained, monkeypatch):
    first, metrics = trained()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 20)  # would raise, were there a step to do
        again, other = trained()
    assert_same_bits(again, first)
    assert other == metrics


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"optimizer.learning_rate": 1e-3}, r"learning_rate was 0\.003, now 0\.001"),
        ({"random_seed": 1, "batch_size": 16}, "was 8, now 16; random_seed was 0, now 1"),
    ],
)
def test_other_settings_in_a_half_done_folder_are_refused(trained, tmp_path, changes, fault):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 8)
        trained()
    before = (tmp_path / "training" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=fault) as caught:
        trained(vary(CONFIG, changes))
    assert str(tmp_path / "training") in str(caught.value)
    assert (tmp_path / "training" / "metrics.jsonl").read_bytes() == before
    # How often it is saved and logged may change.
    trained(vary(CONFIG, {"runtime.checkpoint_every": 2, "runtime.log_every": 3}))


def test_other_languages_in_a_half_done_folder_are_refused(trained):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 8)
        trained()
    with pytest.raises(UserError, match="the languages differ"):
        trained(sources=SOURCES[:2])


@pytest.mark.parametrize(
    ("method", "error", "reason"),
    [
        ("save", OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        ("check_for_errors", OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        ("save", ValueError(), "ValueError"),
    ],
)
def test_a_checkpoint_that_cannot_be_saved_is_a_users_mistake(
    trained, tmp_path, monkeypatch, method, error, reason
):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(ocp.CheckpointManager, method, fail)
    with pytest.raises(UserError, match=rf"cannot save a checkpoint in .*{reason}") as caught:
        trained()
    assert str(tmp_path / "training" / "checkpoints") in str(caught.value)


@pytest.mark.slow
def test_a_training_killed_at_any_moment_ends_with_the_same_bytes(
    initialised, tiny_settings, xelm, tmp_path
):
    settings = tiny_settings(experts__tokens=128 * 600, experts__runtime__checkpoint_every=7)
    corpus = json.loads((initialised[0] / "run.json").read_text())["corpus"]
    runs = [tmp_path / "whole", tmp_path / "killed"]
    xelm("cluster", "-k", 2, "--languages", "en,de,es,fr", "--out", tmp_path / "clusters")
    for run in runs:
        made = xelm(
            "init",
            run,
            "--corpus",
            corpus,
            "--languages",
            "en,de,es,fr",
            "--clusters",
            tmp_path / "clusters",
            *settings,
        )
        assert made.code == 0, made.err
    command = [sys.executable, "-m", "xelm.cli", "train", "--all"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([*command, runs[0]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    draw = random.Random(0)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed = 0
    for _ in range(30):
        process = subprocess.Popen([*command, runs[1]], env=environment, **quiet)
        before = progress_of(runs[1])
        wanted = draw.randint(1, 30)
        while progress_of(runs[1]) < before + wanted and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.02)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert killed == 30
    done = subprocess.run([*command, runs[1]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights = sorted(runs[0].glob("experts/*/v1/model.safetensors"))
    assert len(weights) == 2
    for path in weights:
        other = runs[1] / path.relative_to(runs[0])
        assert other.read_bytes() == path.read_bytes()
        assert not (runs[1] / "train" / path.parts[-3]).exists()  # what a crash left is gone
    assert xelm("verify", runs[1]).code == 0


def progress_of(run) -> int:
    """Steps whose metrics are on disk, over all experts."""
    while True:
        found = [*run.glob("train/*/metrics.jsonl"), *run.glob("experts/*/v1/metrics.jsonl")]
        try:
            return sum(path.read_bytes().count(b"\n") for path in found)
        except FileNotFoundError:  # an expert was published between the listing and the reading
            continue


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings(UNRAISABLE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    trained, tmp_path, monkeypatch, capsys
):
    whole, _ = trained(folder="whole")
    with pytest.raises(Interrupt):
        interrupt_at(monkeypatch, 15)
        trained(folder="broken")
    monkeypatch.undo()
    checkpoints = tmp_path / "broken" / "checkpoints"
    steps = sorted(int(path.name) for path in checkpoints.iterdir())
    assert steps == [6, 12]
    for file in (checkpoints / "12" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"not what it was")
    again, _ = trained(folder="broken")
    said = capsys.readouterr().err
    assert "step 12 is damaged" in said and "test: resumes after step 6" in said
    assert_same_bits(again, whole)
    # It is kept, should it be of use to somebody.
    assert (tmp_path / "broken" / "damaged-12" / "state").is_dir()


def test_a_checkpoint_whose_facts_were_changed_is_damaged(trained, tmp_path, capsys):
    half_done(trained, tmp_path / "broken")
    file = tmp_path / "broken/checkpoints/12/facts/metadata"
    facts = json.loads(file.read_text())
    facts["language_tokens"] = {tag: count + 1 for tag, count in facts["language_tokens"].items()}
    file.write_text(json.dumps(facts))
    trained(folder="broken")
    said = capsys.readouterr().err
    assert "the checkpoint of step 12 is damaged (facts are not as they were written)" in said
    assert "test: resumes after step 6" in said


def test_values_that_are_read_otherwise_than_they_were_saved_are_named(
    trained, tmp_path, monkeypatch, capsys
):
    """As from a disk that gives back other bytes, which Orbax does not look at."""
    whole, _ = trained(folder="whole")
    half_done(trained, tmp_path / "broken")
    restore = checkpoint.Checkpoints._restored

    def harmed(self, step, **what):
        found = restore(self, step, **what)
        if step == 12 and "state" in what:
            table = found.parameters["embedding"]
            bits = jax.lax.bitcast_convert_type(table, jnp.int32).at[3, 5].add(1)  # the last bit
            changed = jax.lax.bitcast_convert_type(bits, table.dtype)
            parameters = found.parameters | {"embedding": changed}
            return found._replace(parameters=parameters)
        return found

    monkeypatch.setattr(checkpoint.Checkpoints, "_restored", harmed)
    again, _ = trained(folder="broken")
    said = capsys.readouterr().err
    assert "the checkpoint of step 12 is damaged (parameters/embedding not as written)" in said
    assert_same_bits(again, whole)


def test_neither_saving_nor_going_on_reads_the_checkpoints_files(trained, tmp_path, monkeypatch):
    """At 7 B parameters that took minutes: fingerprints are computed where the state lies."""
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("a file was hashed"))
    half_done(trained, tmp_path / "half")
    trained(folder="half")


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings(UNRAISABLE)
@pytest.mark.parametrize("harm", ["flipped", *slow("cut", "gone")])
def test_any_change_of_a_checkpoint_is_noticed(trained, tmp_path, monkeypatch, capsys, harm):
    whole, _ = trained(folder="whole")
    half_done(trained, tmp_path / "broken")
    files = [path for path in (tmp_path / "broken/checkpoints/12").rglob("*") if path.is_file()]
    spoilt = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(spoilt.read_bytes())
    if harm == "gone":
        spoilt.unlink()
    else:
        content[len(content) // 2] ^= 1  # a single bit
        spoilt.write_bytes(content if harm == "flipped" else content[:-1])
    again, _ = trained(folder="broken")
    said = capsys.readouterr().err
    assert "the checkpoint of step 12 is damaged (" in said
    assert "test: resumes after step 6" in said
    assert_same_bits(again, whole)


def end_at(monkeypatch, step: int, times: int = 1, by: int = signal.SIGTERM):
    """The machine is to be given back, or Ctrl-C pressed, as the metrics of that step are
    written."""
    write = MetricsLog.write

    def ask(self, line):
        write(self, line)
        for _ in range(times if line["step"] == step else 0):
            os.kill(os.getpid(), by)

    monkeypatch.setattr(MetricsLog, "write", ask)


@pytest.mark.parametrize("by", [signal.SIGTERM, *slow(signal.SIGINT)])
@pytest.mark.parametrize("step", [8, 19, *slow(1, 20)])
def test_a_training_that_is_asked_to_end_is_saved_first(trained, tmp_path, step, by):
    whole, metrics = trained(folder="whole")
    before = signal.getsignal(by)
    with pytest.MonkeyPatch.context() as patch:
        end_at(patch, step, by=by)
        with pytest.raises(Preempted, match="test was stopped by a signal; it is saved") as stop:
            trained(folder="ended")
    assert stop.value.by == by
    saved = [int(path.name) for path in (tmp_path / "ended/checkpoints").iterdir()]
    assert max(saved) == min(20, step + 1)
    assert signal.getsignal(by) == before
    again, other = trained(folder="ended")
    assert_same_bits(again, whole)
    assert_same_lines(other, metrics)


def test_two_requests_to_end_at_one_moment_are_one(trained, tmp_path):
    """Whoever ends a group of processes asks each, and so may their parent."""
    with pytest.MonkeyPatch.context() as patch:
        end_at(patch, 8, times=2)
        with pytest.raises(Preempted):
            trained(folder="ended")
    assert max(int(path.name) for path in (tmp_path / "ended/checkpoints").iterdir()) == 9


def test_the_signal_of_a_parent_some_time_after_that_of_the_group_ends_nothing(monkeypatch):
    """Ctrl-C reaches a group of processes, and a parent that is kept waiting terminates the others
    when it learns of it: they are saving then."""
    monkeypatch.setattr(preemption, "_SAME_SECONDS", -1.0)
    ended = []
    before = {
        n: signal.signal(n, lambda *_: ended.append(True)) for n in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        with pytest.raises(Preempted) as stop, preemption.preemption("test") as asked:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked() and not ended
        assert stop.value.by == signal.SIGINT
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_second_request_some_time_later_ends_at_once(monkeypatch):
    ended = []
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "_SAME_SECONDS", -1.0)
        before = signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
        try:
            with pytest.raises(Preempted), preemption.preemption("test") as asked:
                os.kill(os.getpid(), signal.SIGTERM)
                assert asked() and not ended
                os.kill(os.getpid(), signal.SIGTERM)
                assert ended == [True]
        finally:
            signal.signal(signal.SIGTERM, before)


def test_a_training_of_another_version_is_refused(trained, tmp_path, monkeypatch):
    half_done(trained, tmp_path / "older")
    monkeypatch.setattr(trainer, "_FORMAT", trainer._FORMAT + 1)
    with pytest.raises(UserError, match="unfinished training of another version of xelm"):
        trained(folder="older")


def test_as_many_checkpoints_are_kept_as_asked_for(trained, tmp_path):
    config = vary(
        CONFIG,
        {"runtime.checkpoint_every": 2, "runtime.keep_checkpoints": 3, "runtime.keep_every": 8},
    )
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 19)
        trained(config)
    kept = sorted(int(path.name) for path in (tmp_path / "training/checkpoints").iterdir())
    assert kept == [8, 14, 16, 18]


def half_done(trained, folder: Path) -> list[Path]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 15)
        trained(folder=folder.name)
    return sorted(file for file in (folder / "checkpoints").rglob("*") if file.is_file())


@pytest.mark.slow
@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings(UNRAISABLE)
def test_checkpoints_that_are_all_damaged_are_named_and_left_alone(trained, tmp_path):
    files = half_done(trained, tmp_path / "broken")
    for file in files:
        if "state" in file.parts:
            file.write_bytes(b"not what it was")
    with pytest.raises(UserError, match=r"step 12 is .*; the checkpoint of step 6 is .*; delete"):
        trained(folder="broken")
    assert sorted(f for f in (tmp_path / "broken/checkpoints").rglob("*") if f.is_file()) == files


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.EMFILE, "Too many open files"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    ],
)
def test_healthy_checkpoints_outlive_a_machine_in_trouble(trained, tmp_path, monkeypatch, error):
    files = half_done(trained, tmp_path / "half")

    def fail(*arguments, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "restore", fail)
        with pytest.raises(type(error)):
            trained(folder="half")
    assert sorted(f for f in (tmp_path / "half/checkpoints").rglob("*") if f.is_file()) == files
