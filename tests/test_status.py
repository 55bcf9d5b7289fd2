"""`xelm status`: what the files of a RUN say of its trainings."""

import shutil
import time

import pytest

from experts.lock import locked, owner
from xelm import open_run
from xelm.progress import duration
from xelm.runs import train
from xelm.runs.status import progress
from xelm.training.metrics import MetricsLog


@pytest.fixture
def run(xelm, initialised, tiny, tmp_path):
    """A RUN of which nothing but the seed is trained."""
    shutil.copytree(initialised[0], tmp_path / "RUN")
    xelm("branch", tmp_path / "RUN", "--clusters", tiny.clusters)
    return open_run(tmp_path / "RUN")


def of(run, name):
    return next(each for each in progress(run) if each.name == name)


def interrupted(run, name, step):
    write = MetricsLog.write
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(self, line):
            write(self, line)
            if line["step"] == step:
                raise KeyboardInterrupt

        patch.setattr(MetricsLog, "write", stop)
        run.train(name)


def test_before_and_after_a_training(run, tiny):
    seed, first, second = progress(run)
    assert (seed.name, seed.state, seed.version, seed.note) == ("seed", "done", None, "")
    assert seed.step == seed.steps == 16 and seed.tokens > 0 and seed.loss
    assert {first.name, second.name} == {"en-es", "de-fr"}
    assert (first.state, first.step, first.steps, first.loss) == ("waiting", 0, None, None)
    done = of(open_run(tiny.directory), "en-es")
    assert (done.state, done.version, done.step) == ("done", 1, done.steps)
    assert done.tokens == open_run(tiny.directory).registry().expert("en-es").tokens
    assert done.tokens_per_second and done.seconds_left is None


def test_a_training_that_was_interrupted(run):
    interrupted(run, "de-fr", 6)
    found = of(run, "de-fr")
    assert (found.state, found.step, found.checkpoint_step) == ("stopped", 6, 4)
    assert found.steps and found.steps > 6 and found.seconds_left is None
    assert found.checkpoint_seconds is not None and 0 <= found.checkpoint_seconds < 60
    # What a process that was killed leaves of its lock does not count.
    note = run.directory / ".locks" / "train-de-fr.txt"
    note.write_text("process 1 on a machine that is gone")
    assert of(run, "de-fr").state == "stopped"


def test_while_somebody_trains_it(run):
    interrupted(run, "de-fr", 6)
    assert owner(run.directory, "train-de-fr") is None
    with locked(run.directory, "train-de-fr"):
        found = of(run, "de-fr")
    assert found.state == "training" and found.note.startswith("process ")
    rate = found.tokens / found.step / found.tokens_per_second
    assert found.seconds_left == pytest.approx((found.steps - 6) * rate)


def test_one_that_fails_leaves_the_others_alone_and_is_told_of(xelm, run, tiny, monkeypatch):
    train_checkpoints = train.train_checkpoints

    def fail(run, jobs):
        if jobs[0].name == "de-fr":
            raise train.UserError("its text is gone")
        return train_checkpoints(run, jobs)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_checkpoints", fail)
        outcome = xelm("train", run.directory, "--all")
    assert outcome.code == 2 and outcome.err.splitlines()[-1] == "xelm: its text is gone"
    lines = outcome.out.splitlines()
    assert lines[0].split()[:3] == ["training", "state", "progress"]
    assert [line.split()[:2] for line in lines[1:4]] == [
        *(["seed", "done"], ["de-fr@v1", "failed"], ["en-es@v1", "done"])
    ]
    assert lines[4:] == ["de-fr: its text is gone"]
    path = "experts/en-es/v1/model.safetensors"
    assert (run.directory / path).read_bytes() == (tiny.directory / path).read_bytes()
    # Tried again, it is well.
    assert xelm("train", run.directory, "--all").code == 0
    assert of(run, "de-fr").state == "done"


def test_status_from_the_command_line(xelm, tiny, monkeypatch):
    outcome = xelm("status", tiny.directory, "--json")
    assert [each["name"] for each in outcome.json()][:3] == ["seed", "dense", "de-fr"]
    shown = xelm("status", tiny.directory).out
    assert shown.splitlines()[1].split()[:3] == ["seed", "done", "100.0%"]
    times = []

    def stop(seconds):
        times.append(seconds)
        if len(times) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", stop)
        outcome = xelm("status", tiny.directory, "--watch")
    assert outcome.code == 0 and outcome.out == 3 * shown
    assert xelm("status", tiny.directory, "--watch", "--json").code == 2


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        *((0.2, "0s"), (59.4, "59s"), (60, "1m 0s"), (3599, "59m 59s")),
        *((3600, "1h 0m"), (86_399, "23h 59m"), (100_000, "1d 3h"), (-5, "0s")),
    ],
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def test_after_a_rollback_the_version_in_use_is_shown_and_the_other_named(xelm, copy):
    run = open_run(copy.directory)
    first = run.registry().expert("de-fr", 1)
    shutil.copytree(first.directory(run.directory), run.directory / "experts/de-fr/v2")
    with locked(run.directory):
        registry = run.registry().start("de-fr")
        registry.save(run.directory)
    shown = [(e.name, e.version, e.state) for e in progress(run) if e.name == "de-fr"]
    # Its files are there already, as after a crash between writing and publishing.
    assert shown == [("de-fr", 1, "done"), ("de-fr", 2, "waiting")]
    registry.publish("de-fr", 2, sha256=first.sha256, tokens=first.tokens).save(run.directory)
    assert [e.version for e in progress(run) if e.name == "de-fr"] == [2]
    assert xelm("rollback", run.directory, "de-fr").code == 0
    found = of(run, "de-fr")
    assert (found.version, found.state, found.note) == (1, "done", "in use again: v2 is retired")
    last = xelm("status", run.directory).out.splitlines()[-1]
    assert last == "de-fr: in use again: v2 is retired"
    run.registry().retire("de-fr", 1).save(run.directory)
    assert [(e.version, e.state) for e in progress(run) if e.name == "de-fr"] == [(2, "retired")]
