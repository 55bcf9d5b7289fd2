"""`xelm status`: how far each training of a RUN is, as its files say. Imports no JAX."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from experts.lock import owner
from xelm.runs.run import Run
from xelm.training.metrics import read_metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Progress of one training."""

    name: str
    """Name of the model."""
    state: Literal["done", "training", "stopped", "failed", "waiting", "retired"]
    """stopped: begun, and no process is training it. waiting: not begun. retired: trained, and no
    version of that expert is in use."""
    version: int | None
    """Version of an expert; None for the seed and dense."""
    step: int
    """Number of steps done."""
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
    found = list(_models(run))
    registry = run.registry()
    shown = [*registry.published(), *registry.training()]
    names = {expert.name for expert in shown}
    shown += {e.name: e for e in registry.experts if e.name not in names}.values()
    for expert in sorted(shown, key=lambda e: (e.round, e.name, e.version)):
        done = expert.directory(run.directory) if expert.status != "training" else None
        each = _progress(run, expert.name, expert.version, done)
        newest = registry.versions(expert.name)[-1]
        if expert.status == "retired":
            each = replace(each, state="retired")
        elif newest.status == "retired":  # rolled back from that one
            each = replace(each, note=f"in use again: v{newest.version} is retired")
        found.append(each)
    return found


def _models(run: Run) -> Iterator[Progress]:
    for name, path in {"seed": run.seed, "dense": run.dense}.items():
        done = (path / "metrics.jsonl").exists()
        if done or run.training(name).exists():
            yield _progress(run, name, None, path if done else None)


def _progress(run: Run, name: str, version: int | None, done: Path | None) -> Progress:
    work = run.training(name)
    lines = read_metrics((done or work) / "metrics.jsonl")
    last: Mapping[str, Any] = lines[-1] if lines else {}
    steps, step = last.get("steps"), last.get("step", 0)
    rate, tokens = last.get("tokens_per_second"), last.get("tokens", 0)
    who = None if done else owner(run.directory, f"train-{name}")
    why = "" if done or who else _text(run.failure(name))
    left = None
    if who and steps and rate and step:
        left = (steps - step) * (tokens / step) / rate
    saved = None if done else _newest_checkpoint(work / "checkpoints")
    state = "waiting"
    if done:
        state = "done"
    elif who:
        state = "training"
    elif why:
        state = "failed"
    elif lines or saved:
        state = "stopped"
    return Progress(
        name=name,
        state=state,
        version=version,
        step=step,
        steps=step if done else steps,
        tokens=tokens,
        loss=last.get("loss"),
        tokens_per_second=_mean_rate(lines) if done else rate,
        seconds_left=left,
        checkpoint_step=saved and saved[0],
        checkpoint_seconds=saved and time.time() - saved[1],
        note=who or why,
    )


def _mean_rate(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens a second over a whole training."""
    tokens = [b["tokens"] - a["tokens"] for a, b in zip([{"tokens": 0}, *lines], lines)]
    rates = [line.get("tokens_per_second") or 0.0 for line in lines]
    if not lines or min(rates) <= 0:
        return None
    return lines[-1]["tokens"] / sum(some / rate for some, rate in zip(tokens, rates))


def _newest_checkpoint(folder: Path) -> tuple[int, float] | None:
    """Step, and when it was saved."""
    found = [path for path in folder.glob("*") if path.name.isdigit()]
    newest = max(found, key=lambda path: int(path.name), default=None)
    try:
        return newest and (int(newest.name), newest.stat().st_mtime)
    except FileNotFoundError:  # deleted meanwhile
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
