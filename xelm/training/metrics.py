"""metrics.jsonl: one line every few steps, cut back to the checkpoint when a training resumes; and
the same for TensorBoard and Weights & Biases."""

import json
import math
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from clustering.files import replace

METRICS, HELD_OUT = "metrics.jsonl", "held_out.jsonl"
"""Names of the files with the metrics of steps and with the measurements on held-out text."""
_PATIENCE = 60.0
"""Seconds that Weights & Biases may take at the end of a training to send what it has."""


class MetricsLog:
    """Log of a training: a JSONL file and, if requested, TensorBoard and Weights & Biases."""

    def __init__(
        self,
        path: str | Path,
        *,
        last_step: int,
        logs: Path | None = None,
        tensorboard: bool = False,
        wandb: Mapping[str, Any] | None = None,
    ):
        """Lines after `last_step` are dropped, since those steps will be done again. logs: folder
        of the other logs; None takes that of the JSONL file. wandb: arguments of `wandb.init`; None
        starts no run."""
        path = Path(path)
        held_out = path.with_name(HELD_OUT)
        for each in (path, *([held_out] if held_out.exists() else [])):
            kept = [line for line in read_metrics(each) if line["step"] <= last_step != 0]
            content = "".join(json.dumps(line) + "\n" for line in kept).encode()
            replace(each, lambda file, content=content: file.write(content))
        self._others: list[_TensorBoard | _WeightsAndBiases] = []
        if tensorboard:
            self._others.append(_TensorBoard(logs or path.parent, last_step))
        if wandb is not None:
            remembered = path.with_name("wandb-id")
            self._others.append(_WeightsAndBiases(logs or path.parent, remembered, wandb))
        self._file, self._held_out = path.open("a"), held_out

    def write(self, line: dict[str, Any]) -> None:
        """Writes a line: numbers by name, or by two names, with its "step"."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for other in self._others:
            other.write(_scalars(line), line["step"])

    def write_held_out(self, line: dict[str, Any]) -> None:
        """Writes a measurement on held-out text to held_out.jsonl and, as "held_out", to the other
        logs."""
        with self._held_out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        measured = {name: value for name, value in line.items() if name not in ("step", "tokens")}
        for other in self._others:
            other.write(_scalars({"held_out": measured}), line["step"])

    def close(self) -> None:
        """Closes all logs."""
        with ExitStack() as stack:
            stack.callback(self._file.close)
            for other in self._others:
                stack.callback(other.close)


class _TensorBoard:
    """TensorBoard events in a folder."""

    def __init__(self, folder: Path, last_step: int):
        import tensorboardX

        events = str(folder / "tensorboard")
        # Later steps in the same folder, of a training that was interrupted, are dropped.
        self._events = tensorboardX.SummaryWriter(events, purge_step=last_step + 1)

    def write(self, scalars: Mapping[str, int | float], step: int) -> None:
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


class _WeightsAndBiases:
    """A run of Weights & Biases, the same one whenever its training is resumed, configured by the
    variables WANDB_PROJECT, WANDB_MODE, WANDB_API_KEY. If it fails, one line on stderr says so, and
    the training continues without it."""

    def __init__(self, folder: Path, remembered: Path, about: Mapping[str, Any]):
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        if not remembered.exists():
            replace(remembered, lambda file: file.write(secrets.token_hex(8).encode()))
        self._run: Any = None
        with self._surviving():
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "xelm"),
                dir=folder,
                id=remembered.read_text(),
                resume="allow",
                reinit="create_new",  # beside the runs of other experts in this process
                settings=wandb.Settings(console="off", finish_timeout=_PATIENCE),
                **about,
            )

    def write(self, scalars: Mapping[str, int | float], step: int) -> None:
        # Its server keeps the first values of steps that are done again.
        with self._surviving():
            if self._run is not None:
                self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        with self._surviving():
            if self._run is not None:
                self._run.finish()

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the library, its process or the network failed
            self._run = None
            said = " ".join(str(error).split()) or type(error).__name__
            print(f"Weights & Biases: {said}; continuing without it", file=sys.stderr)


def _scalars(line: Mapping[str, Any]) -> dict[str, int | float]:
    found = {name: value for name, value in line.items() if isinstance(value, int | float)}
    for name in [name for name, value in line.items() if isinstance(value, Mapping)]:
        found |= {f"{name}/{inner}": each for inner, each in _scalars(line[name]).items()}
    return found


def seconds_of(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds that the logged steps took, at their rates; None where these are unknown."""
    tokens = [line["tokens"] for line in lines]
    rates = [line.get("tokens_per_second") or 0.0 for line in lines]
    if not lines or min(rates) <= 0:
        return None
    return sum((now - before) / rate for before, now, rate in zip([0, *tokens], tokens, rates))


def trained_tokens(folder: Path) -> int:
    """Number of tokens that the result of a training was trained on, from its two files."""
    found = best(read_metrics(folder / HELD_OUT)) or read_metrics(folder / METRICS)[-1]
    return found["tokens"]


def best(measurements: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The measurement with the lowest loss after step 0, the earliest of equal ones; None if there
    is none with a finite loss."""
    found = [each for each in measurements if each["step"] and each["loss"] is not None]
    return min(found, key=lambda each: each["loss"], default=None)


def without_improvement(measurements: Sequence[Mapping[str, Any]]) -> int:
    """Number of measurements since the one with the lowest loss, that of step 0 among them."""
    losses = [math.inf if each["loss"] is None else each["loss"] for each in measurements]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, if it exists, without a last one cut short by a crash."""
    lines = []
    for text in Path(path).read_text().splitlines() if Path(path).exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
