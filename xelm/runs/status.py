"""`xelm status`: how far each training of a RUN is, as its files say. Imports no JAX."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from experts.lock import owner
from xelm.runs.jobs import is_kept_back
from xelm.runs.run import Run
from xelm.training.metrics import read_metrics, seconds_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Progress of one training."""

    name: str
    state: Literal[
        "done", "training", "stopped", "failed", "waiting", "kept back", "retired", "parent"
    ]
    """stopped: begun, and no process is training it. waiting: not begun. kept back: trained, and
    worse than the gate allows. retired: trained, and no version of that expert is in use. parent:
    the intermediate expert of a round of training, which is trained and never in use."""
    version: int | None
    """Version of an expert; None for the seed and dense."""
    step: int
    steps: int | None
    """Number of steps in all; None while no step is known."""
    tokens: int
    """Number of predicted tokens."""
    loss: float | None
    """Loss of the last logged step, in nats per token."""
    tokens_per_second: float | None
    """Rate of the last logged step or, of a finished training, of all of it."""
    seconds_left: float | None
    """Seconds left at that rate; None unless it is training."""
    checkpoint_step: int | None
    """Step of the newest checkpoint of an unfinished training."""
    checkpoint_seconds: float | None
    """Seconds since that was saved."""
    note: str
    """The process that trains it, why it failed, or which newer version is not in use."""


def progress(run: Run) -> list[Progress]:
    """Progress of the seed and the dense baseline, where they are trained, and of every expert: the
    version in use and the one in training or, without either, the newest retired one."""
    found, registry = [], run.registry()
    unfinished = sorted((run.directory / "train").glob("*+*"))
    others = run.combined() | {
        name: run.directory / name
        for name in (path.name.replace("+", "/") for path in unfinished if path.is_dir())
    }
    for name, path in ({"seed": run.seed, "dense": run.dense} | others).items():
        finished = (path / "metrics.jsonl").exists()
        if finished or run.training(name).exists():
            found.append(_progress(run, name, None, path if finished else None))
    shown = [*registry.published(), *registry.training()]
    names = {expert.name for expert in shown}
    shown += {e.name: e for e in registry.experts if e.name not in names}.values()
    for expert in sorted(shown, key=lambda e: (e.round, e.name, e.version)):
        directory, failure = expert.directory(run.directory), run.failure(expert.name)
        kept_back = is_kept_back(run, expert)
        done = directory if kept_back or expert.status != "training" else None
        each = _progress(run, expert.name, expert.version, done)
        if kept_back:
            each = replace(each, state="kept back", note=failure.read_text(encoding="utf-8"))
        newest = registry.versions(expert.name)[-1]
        if expert.status == "retired":
            each = replace(each, state=expert.state)
        elif expert.awaits and each.state == "waiting":
            each = replace(each, note=f"to start from {expert.awaits}")
        elif newest.status == "retired":  # rolled back from that one
            each = replace(each, note=f"in use again: v{newest.version} is retired")
        found.append(each)
    return found


def _progress(run: Run, name: str, version: int | None, done: Path | None) -> Progress:
    work = run.training(name)
    lines = read_metrics((done or work) / "metrics.jsonl")
    last: Mapping[str, Any] = lines[-1] if lines else {}
    steps, step = last.get("steps"), last.get("step", 0)
    rate, tokens = last.get("tokens_per_second"), last.get("tokens", 0)
    if done:
        seconds = seconds_of(lines)
        rate = tokens / seconds if seconds else None
    who = None if done else owner(run.directory, f"train-{work.name}")
    why = ""
    if not (done or who):
        with suppress(FileNotFoundError):
            why = run.failure(name).read_text(encoding="utf-8")
    known = who and steps and rate and step
    saved = None if done else _newest_checkpoint(work / "checkpoints")
    states = {"done": done, "training": who, "failed": why, "stopped": lines or saved}
    state: Any = next((name for name, holds in states.items() if holds), "waiting")
    return Progress(
        name=name,
        state=state,
        version=version,
        step=step,
        steps=step if done else steps,
        tokens=tokens,
        loss=last.get("loss"),
        tokens_per_second=rate,
        seconds_left=(steps - step) * (tokens / step) / rate if known else None,
        checkpoint_step=saved and saved[0],
        checkpoint_seconds=saved and time.time() - saved[1],
        note=who or why,
    )


def _newest_checkpoint(folder: Path) -> tuple[int, float] | None:
    """Step, and when it was saved."""
    found = [path for path in folder.glob("*") if path.name.isdigit()]
    newest = max(found, key=lambda path: int(path.name), default=None)
    with suppress(FileNotFoundError):  # it was deleted meanwhile
        return newest and (int(newest.name), newest.stat().st_mtime)
    return None
