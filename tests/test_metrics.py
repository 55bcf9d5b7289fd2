"""What is written beside metrics.jsonl: TensorBoard's events, and a run of Weights & Biases."""

import json

import pytest
import wandb
from small_training import CONFIG, Interrupt, interrupt_at
from tensorboardX.proto.event_pb2 import Event
from wandb.proto.wandb_internal_pb2 import Record

from xelm.settings import vary
from xelm.training.metrics import MetricsLog

LINE = {"step": 3, "loss": None, "grad_norm": 0.5, "language_tokens": {"de": 7, "el": 5}}
SCALARS = {"step": 3, "grad_norm": 0.5, "language_tokens/de": 7, "language_tokens/el": 5}


def events(file):
    """(name, step) -> value, and the steps from which on earlier files count no more."""
    found, starts, data = {}, [], file.read_bytes()
    while data:  # length, checksum, event, checksum
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        if event.HasField("session_log"):
            starts.append(event.step)
    return found, starts


def test_tensorboard_has_the_numbers_of_a_line_and_goes_on_where_the_training_does(tmp_path):
    for folder, last in {"first": 0, "second": 2}.items():
        logs = tmp_path / folder
        path = tmp_path / "metrics.jsonl"
        log = MetricsLog(path, last_step=last, logs=logs, tensorboard=True)
        log.write(LINE)
        log.close()
        (file,) = (logs / "tensorboard").iterdir()
        found, starts = events(file)
        assert found == {(name, 3): value for name, value in SCALARS.items()}
        assert starts == [last + 1]
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["metrics.jsonl"]


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def records(file):
    """Records of a log of Weights & Biases. It has a head of 7 bytes, then LevelDB's blocks of 32
    KiB with pieces of checksum, length, kind (1 whole, 2 first, 3 middle, 4 last) and data."""
    data, at, whole = file.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:  # too little is left of a block for a head
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""


def history(folder):
    """The record and the lines of each run of Weights & Biases below a folder."""
    runs = []
    for file in sorted(folder.rglob("run-*.wandb")):
        run, lines = None, []
        for record in records(file):
            run = record.run if record.HasField("run") else run
            if record.HasField("history"):
                items = record.history.item
                lines.append({"/".join(i.nested_key) or i.key: i.value_json for i in items})
        runs.append((run, [{k: json.loads(v) for k, v in line.items()} for line in lines]))
    return runs


@pytest.mark.slow
def test_a_run_of_weights_and_biases_has_the_lines_and_is_gone_on_with(
    trained, tmp_path, offline, monkeypatch
):
    monkeypatch.setenv("WANDB_PROJECT", "uralic")
    config = vary(CONFIG, {"runtime.wandb": True})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 9)
        trained(config)
    _, metrics = trained(config)
    (first, before), (second, after) = history(tmp_path / "training")
    assert first.run_id == second.run_id and len(first.run_id) == 16
    assert (first.project, first.display_name) == ("uralic", "test")
    settings = {each.key: json.loads(each.value_json) for each in first.config.update}
    optimizer = settings["optimizer"]
    assert (optimizer["learning_rate"], optimizer["name"]) == (0.003, "adamw")
    assert [line["step"] for line in before] == list(range(1, 9))
    assert [line["step"] for line in after] == list(range(7, 21))
    for line, other in zip(after, metrics[6:]):
        assert {name: line[name] for name in ("loss", "grad_norm", "tokens")} == {
            name: other[name] for name in ("loss", "grad_norm", "tokens")
        }
        assert line["language_tokens/el"] == other["language_tokens"]["el"]


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_training_goes_on_without_weights_and_biases(
    trained, tmp_path, monkeypatch, capsys, offline, broken
):
    def fail(*arguments, **options):
        raise ConnectionResetError("Connection\nlost")

    monkeypatch.setattr(wandb if broken == "init" else wandb.Run, broken, fail)
    _, metrics = trained(vary(CONFIG, {"runtime.wandb": True, "tokens": 3 * 128}))
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert (
        capsys.readouterr().err.count("Weights & Biases: Connection lost; continuing without it")
        == 1
    )
