"""One expert's training on its way: its text, its account and its checkpoints, step by step."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clustering.errors import UserError
from xelm.config import TrainConfig, differences, to_json, vary
from xelm.data.masking import Masking, mask_tokens
from xelm.data.rows import ORIGIN, LanguageShare, batches
from xelm.models.config import ModelConfig
from xelm.training.account import Account
from xelm.training.checkpoint import Checkpoints
from xelm.training.hosts import is_first
from xelm.training.metrics import MetricsLog
from xelm.training.optimizer import schedule
from xelm.training.program import Program, state_of
from xelm.training.step import Metrics, State

STATE = 5
"""What a checkpoint holds, and the rows that go on from it; 1 had no guard, 2 no masters in halves,
3 rows of documents in an order drawn by the seed, 4 flat settings."""
DTYPES = ("dtype", "moments_dtype")


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What is to be trained, on what, and where it is kept meanwhile."""

    label: str
    """Its name in messages."""
    start: Callable[[Any], Any]
    """shardings -> the parameters (nested dictionary, float32) that it begins with, each on the
    devices that its sharding says."""
    sources: Sequence[LanguageShare]
    config: TrainConfig
    directory: Path
    """Of checkpoints and metrics.jsonl."""
    logs: Path | None = None
    """Of what else is logged, which is to stay when the directory does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """How rows are made of documents."""

    start_id: int | None
    """None: a document's first token is not predicted."""
    end_id: int
    masking: Masking | None = None
    """Of an encoder."""


class Course:
    """One training on its way, from the step at which it is taken up to its last."""

    def __init__(
        self,
        training: Training,
        model: ModelConfig,
        text: Text,
        checkpoints: Checkpoints,
        step: int,
        facts: dict[str, Any],
        devices: int,
    ):
        """step: those done before. facts: that are saved beside the state. devices: that it runs
        on."""
        config, runtime = training.config, training.config.runtime
        self.label, self.step = training.label, step
        self.failed: UserError | None = None
        """Why it was given up."""
        self._config, self._text, self._facts = config, text, facts
        self._checkpoints, self._rates = checkpoints, schedule(config)
        self._rows = iter(
            batches(
                list(training.sources),
                steps=config.steps,
                batch_size=config.batch_size,
                sequence_length=config.sequence_length,
                start_id=text.start_id,
                end_id=text.end_id,
                random_seed=config.random_seed,
                first_step=step,
            )
        )
        log = None
        if is_first():
            path = training.directory / "metrics.jsonl"
            log = MetricsLog(
                path,
                last_step=step,
                logs=training.logs,
                tensorboard=runtime.tensorboard,
                wandb={"name": self.label, "config": to_json(config)}
                if config.runtime.wandb
                else None,
            )
        seen = facts["language_tokens"]
        self._account = Account(log, config, model, self.label, step, seen, devices)
        self._batch: Mapping[str, np.ndarray] = {}

    @property
    def going(self) -> bool:
        """Whether there are steps to do."""
        return self.step < self._config.steps and not self.failed

    def next(self) -> tuple[dict[str, np.ndarray], float]:
        """Batch and rate of the next step, which is the current one from now on."""
        with self._account.preparing():
            self._batch, self.step = next(self._rows), self.step + 1
            self._account.count(self._batch)
            batch, config = self._batch, self._config
            if self._text.masking is not None:
                masking = self._text.masking
                batch = mask_tokens(
                    batch, masking, config.data.mask_share, config.random_seed, self.step
                )
            arrays = {name: array for name, array in batch.items() if name not in ORIGIN}
            return arrays, self._rates[self.step - 1]

    def saves(self) -> bool:
        """Whether the current step is one after which the state is saved."""
        return (
            self.step % self._config.runtime.checkpoint_every == 0
            or self.step == self._config.steps
        )

    def reports(self) -> bool:
        """Whether it is one that is looked at. Looking waits for the device."""
        return self.saves() or self._account.due(self.step)

    def report(self, metrics: Metrics) -> None:
        """Looks at what the current step gave; it is given up if steps are no use any more."""
        try:
            self._account.report(self.step, metrics, self._rates[self.step - 1], self._batch)
        except UserError as error:
            self.failed = error

    def save(self, state: State, sound: bool) -> None:
        """Saves the state after the current step; sound: whether its parameters are numbers, or it
        is given up."""
        if sound:
            facts = {**self._facts, "language_tokens": dict(self._account.seen)}
            self._checkpoints.save(self.step, state, facts)
        else:
            why = f"its parameters are no numbers after step {self.step}"
            self.failed = self._account.diverged(why)

    def wait(self) -> None:
        """Returns when all that was saved is on disk."""
        self._checkpoints.wait()

    def close(self) -> None:
        """Ends its files and its bar."""
        with closing(self._checkpoints):
            self._account.close()

    @property
    def seen(self) -> dict[str, int]:
        """Language -> targets predicted; by an encoder, tokens read."""
        return dict(self._account.seen)


def begun(
    training: Training, model: ModelConfig, text: Text, functions: Program, number: int
) -> tuple[Course, State]:
    """A training, expert `number` of the program, and its state: of the newest checkpoint, or of a
    training that begins now."""
    config, alone = training.config, functions.alone[number]
    facts = {
        "state": STATE,
        "config": to_json(config),
        "model": to_json(model),
        "language_tokens": {source.ids.language: 0 for source in training.sources},
    }
    mesh = alone.step.sharding.mesh

    def saved(found: dict[str, Any]) -> State:
        _same_training(facts, found, training.directory)
        dtypes = {f"runtime.{name}": found["config"]["runtime"][name] for name in DTYPES}
        return state_of(model, vary(config, dtypes), mesh)

    with jax.set_mesh(mesh), ExitStack() as stack:
        folder = training.directory / "checkpoints"
        checkpoints = Checkpoints(
            folder, config.runtime.keep_checkpoints, config.runtime.keep_every
        )
        stack.callback(checkpoints.close)
        found = checkpoints.newest(saved)
        if found:
            step, state, before = found
            facts["language_tokens"] = before["language_tokens"]
            now, others = facts["config"]["runtime"], before["config"]["runtime"]
            others = {name: others[name] for name in DTYPES if now[name] != others[name]}
            if is_first():
                said = [f", {name} {now[name]} (was {was})" for name, was in others.items()]
                print(
                    f"{training.label}: going on after step {step}{''.join(said)}", file=sys.stderr
                )
            if others:
                state = functions.adopt[number](state)
        else:
            placed = jax.tree.map(lambda array: array.sharding, alone.parameters)
            step, state = 0, functions.create[number](training.start(placed))
        course = Course(training, model, text, checkpoints, step, facts, mesh.size)
        stack.pop_all()  # the course closes its checkpoints from now on
        return course, state


def _same_training(wanted: dict[str, Any], found: dict[str, Any], directory: Path) -> None:
    if found.get("state", 1) != wanted["state"]:
        raise UserError(
            f"{directory} holds an unfinished training of another version of xelm; finish it with "
            "that, or delete the folder to start over"
        )
    differ = [
        each
        for part in ("config", "model")
        for each in differences(found[part], wanted[part])
        if not each.startswith("runtime.")
    ]
    if set(wanted["language_tokens"]) != set(found["language_tokens"]):
        differ.append("the languages differ")
    if differ:
        raise UserError(
            f"{directory} holds an unfinished training with other settings ({'; '.join(differ)}); "
            f"use those again, or delete the folder to start over"
        )
