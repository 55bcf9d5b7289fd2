"""One training as it proceeds: its batches, metrics and checkpoints, step by step."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clustering.errors import UserError
from xelm.data.masking import mask_tokens
from xelm.data.rows import ORIGIN, LanguageShare, batches
from xelm.data.text_format import TextFormat
from xelm.models.config import ModelConfig
from xelm.progress import bar
from xelm.settings import differences, from_json, to_json, vary
from xelm.training.checkpoint import Checkpoints
from xelm.training.compiled import CompiledSteps, state_of
from xelm.training.flops import of_a_token, peak
from xelm.training.held_out import HeldOutText
from xelm.training.hosts import is_first
from xelm.training.metrics import MetricsLog, best, without_improvement
from xelm.training.optimizer import schedule
from xelm.training.step import SavedState, StepMetrics, TrainState, target_weights
from xelm.training.trainable import trained_count
from xelm.training_config import TrainConfig

_FORMAT = 6
"""Version of what a checkpoint contains, and of the rows that follow it."""
_DTYPES = ("dtype", "moments_dtype")


class DivergedError(UserError):
    """Further steps are useless: the settings or the text do not suit the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSpec:
    """What is to be trained, on which text, and where its files are kept meanwhile."""

    label: str
    """Name in messages."""
    start: Callable[[Any], Any]
    """shardings -> the initial parameters (nested dictionary, float32), with these shardings."""
    sources: Sequence[LanguageShare]
    """Documents, with the share of each source in the rows."""
    config: TrainConfig
    held_out: Sequence[LanguageShare] = ()
    """Documents that are not trained on, by which the training is measured; without any, its last
    weights are its result."""
    directory: Path
    """Folder for checkpoints and metrics.jsonl."""
    logs: Path | None = None
    """Folder for other logs, which stay when `directory` is deleted."""


class Trainer:
    """One training as it proceeds: gives the loop its batches, reads its metrics and states."""

    def __init__(
        self,
        spec: TrainingSpec,
        model: ModelConfig,
        text_format: TextFormat,
        checkpoints: Checkpoints,
        step: int,
        facts: dict[str, Any],
        devices: int,
        restore: Callable[[int], tuple[SavedState, dict[str, Any]]],
    ):
        """step: steps done before. facts: JSON saved beside the state. devices: number of them.
        restore: state and facts of the checkpoint of a step, in the dtypes of this training."""
        config = spec.config
        self.label, self.step = spec.label, step
        self.failed: UserError | None = None
        """Why the training was given up."""
        self.language_tokens: dict[str, int] = dict(facts["language_tokens"])
        """Language -> targets predicted so far (of an encoder, tokens read)."""
        self.checkpoints = checkpoints
        self._config, self._model, self._format = config, model, text_format
        self._facts, self._rates, self._restore = facts, schedule(config), restore
        self._languages = [source.ids.language for source in spec.sources]
        self.held_out = HeldOutText(spec.held_out, config, model, text_format)
        self.measurements: list[dict[str, Any]] = list(facts["measurements"])
        """Lines of held_out.jsonl."""
        self._improved = False
        self._rows = batches(spec.sources, config, text_format, first_step=step)
        self._batch: Mapping[str, np.ndarray] = {}
        self._log = None
        if is_first():
            about = {"name": spec.label, "config": to_json(config)}
            self._log = MetricsLog(
                spec.directory / "metrics.jsonl",
                last_step=step,
                logs=spec.logs,
                tensorboard=config.runtime.tensorboard,
                wandb=about if config.runtime.wandb else None,
            )
        tokens = config.tokens_per_step
        self._bar = bar(config.steps * tokens, self.label, "tok", shown=is_first())
        self._bar.update(step * tokens)
        share = trained_count(config, model) / model.parameter_count
        self._flops = of_a_token(model, config.sequence_length, share) * tokens
        self._peak = peak(config.runtime.dtype, devices)
        # Since the last line of metrics: seconds spent on batches, and where it was then.
        self._preparing = 0.0
        self._last = time.perf_counter(), step, self.tokens

    @property
    def tokens(self) -> int:
        """Targets predicted so far, in all languages (of an encoder, tokens read)."""
        return sum(self.language_tokens.values())

    @property
    def active(self) -> bool:
        """Whether steps remain, and further ones may be of use."""
        return self.step < self._config.steps and not self.failed and not self._stopped

    @property
    def _stopped(self) -> bool:
        """Whether the measurements on held-out text end the training before its budget does."""
        patience = self._config.evaluation.patience
        return patience is not None and without_improvement(self.measurements) >= patience

    @property
    def measures(self) -> bool:
        """Whether the parameters after the current step are measured on held-out text."""
        every, last = self._config.steps_between_measurements, self._config.steps
        due = self.step % every == 0 or self.step == last
        known = bool(self.measurements) and self.measurements[-1]["step"] == self.step
        return bool(self.held_out.batches) and due and not known and not self.failed

    def measured(self, nats: np.ndarray, targets: np.ndarray) -> None:
        """Adds the measurement of the current step: sums over the rows of all held-out batches."""
        before = best(self.measurements)
        line = {
            "step": self.step,
            "tokens": self.tokens,
            **self.held_out.measurement(nats, targets),
        }
        self.measurements.append(line)
        self._improved = best(self.measurements) is not before
        if self._log is not None:
            self._log.write_held_out(line)

    def next_batch(self) -> tuple[dict[str, np.ndarray], float]:
        """Arrays and learning rate of the next step, which becomes the current one."""
        began = time.perf_counter()
        self._batch, self.step = next(self._rows), self.step + 1
        batch, segments, config = self._batch, self._batch["segments"], self._config
        targets = target_weights(segments) if self._model.causal else segments[:, :-1] > 0
        for index, count in zip(batch["language"], targets.sum(axis=1)):
            self.language_tokens[self._languages[int(index)]] += int(count)
        self._bar.update(config.tokens_per_step)
        if not self._model.causal:
            batch = mask_tokens(batch, config, self._format, self.step)
        arrays = {name: array for name, array in batch.items() if name not in ORIGIN}
        self._preparing += time.perf_counter() - began
        return arrays, self._rates[self.step - 1]

    @property
    def saves(self) -> bool:
        """Whether the state is saved after the current step."""
        every = self._config.runtime.checkpoint_every
        due = self.step % every == 0 or self.step == self._config.steps
        return due or self._improved or self._stopped

    @property
    def reports(self) -> bool:
        """Whether the metrics of the current step are read, which waits for the device."""
        return self.saves or self.step == 1 or self.step % self._config.runtime.log_every == 0

    def report(self, metrics: StepMetrics) -> None:
        """Logs the metrics of the current step, if it is one of every `log_every` or the last. Sets
        `failed` where further steps are useless."""
        loss, norm = float(metrics.loss), float(metrics.grad_norm)
        found = f"loss {loss:g} and gradient norm {norm:g}"
        if self.step == 1 and not math.isfinite(loss + norm):
            self.failed = UserError(
                f"{self.label} has {found} before anything was learned: look at what it starts from"
            )
        elif metrics.most_in_a_row >= self._config.runtime.skip_limit:
            self.failed = self._diverged(
                f"{metrics.most_in_a_row} steps in a row were skipped; at step {self.step} it has "
                f"{found}, and reads rows {self._origin()}"
            )
        elif self.step % self._config.runtime.log_every == 0 or self.step == self._config.steps:
            self._write(metrics, loss, norm)

    def _write(self, metrics: StepMetrics, loss: float, norm: float) -> None:
        """Writes a line of metrics.jsonl, with speeds since the line before."""
        (clock, step, tokens), now = self._last, time.perf_counter()
        line = {
            "step": self.step,
            "steps": self._config.steps,
            "tokens": self.tokens,
            "loss": loss if math.isfinite(loss) else None,
            "learning_rate": self._rates[self.step - 1],
            "grad_norm": norm if math.isfinite(norm) else None,
            "skipped": int(metrics.skipped),
            "tokens_per_second": (self.tokens - tokens) / (now - clock),
            "data_share": self._preparing / (now - clock),
            "language_tokens": dict(self.language_tokens),
        }
        if self._peak is not None:
            line["utilisation"] = self._flops * (self.step - step) / (now - clock) / self._peak
        if self._log:
            self._log.write(line)
        self._last, self._preparing = (now, self.step, self.tokens), 0.0
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def save(self, state: TrainState, finite: bool) -> None:
        """Saves the state after the current step; sets `failed` unless it is `finite`."""
        if finite:
            facts = {
                **self._facts,
                "language_tokens": dict(self.language_tokens),
                "measurements": self.measurements,
            }
            self._keep_best()
            self.checkpoints.save(self.step, state.saved, facts)
            self._improved = False
        else:
            self.failed = self._diverged(f"its parameters are not finite after step {self.step}")

    def _keep_best(self) -> None:
        found = best(self.measurements)
        self.checkpoints.best = None if found is None else found["step"]

    def result(self, state: SavedState) -> SavedState:
        """The state whose weights are the result of the training: that of the best measurement or,
        without measurements, `state`, the last one. `state` is deleted where another takes its
        place."""
        self.checkpoints.wait()
        found = best(self.measurements)
        if found is None or found["step"] == self.step:
            return state
        jax.tree.map(lambda x: x.delete(), state)
        state, facts = self._restore(found["step"])
        self.step, self.language_tokens = found["step"], facts["language_tokens"]
        return state

    def close(self) -> None:
        """Closes checkpoints, logs and the progress bar."""
        with closing(self.checkpoints), closing(self._bar):
            if self._log:
                self._log.close()

    def _diverged(self, why: str) -> DivergedError:
        return DivergedError(
            f"the training of {self.label} has diverged: {why}; a peak rate of "
            f"{self._config.optimizer.learning_rate:g} may be too much for it"
        )

    def _origin(self) -> str:
        """Rows of the current batch, as in "de 3, 17; el 5"."""
        rows: dict[str, list[str]] = {}
        for index, row in zip(self._batch["language"].tolist(), self._batch["row"].tolist()):
            rows.setdefault(self._languages[index], []).append(str(row))
        return "; ".join(f"{language} {', '.join(some)}" for language, some in rows.items())


def resume(
    spec: TrainingSpec,
    model: ModelConfig,
    text_format: TextFormat,
    compiled: CompiledSteps,
    number: int,
) -> tuple[Trainer, TrainState]:
    """The trainer of expert `number` of a program, and its state, from a checkpoint or new."""
    config, alone = spec.config, compiled.alone[number]
    facts = {
        "state": _FORMAT,
        "config": to_json(config),
        "model": to_json(model),
        "language_tokens": {source.ids.language: 0 for source in spec.sources},
        "measurements": [],
    }
    mesh = alone.step.sharding.mesh

    def saved(found: dict[str, Any]) -> SavedState:
        _check_same_training(facts, found, spec.directory)
        dtypes = {f"runtime.{name}": found["config"]["runtime"][name] for name in _DTYPES}
        return state_of(model, vary(config, dtypes), mesh).saved

    with jax.set_mesh(mesh), ExitStack() as stack:
        keep = config.runtime.keep_checkpoints, config.runtime.keep_every
        checkpoints = Checkpoints(spec.directory / "checkpoints", *keep)
        stack.callback(checkpoints.close)
        if found := checkpoints.newest(saved):
            step, changed, before = found
            facts |= {name: before[name] for name in ("language_tokens", "measurements")}
            now, then = facts["config"]["runtime"], before["config"]["runtime"]
            others = [name for name in _DTYPES if now[name] != then[name]]
            if is_first():
                changes = "".join(f", {name} {now[name]} (was {then[name]})" for name in others)
                print(f"{spec.label}: resumes after step {step}{changes}", file=sys.stderr)
            if others:
                changed = compiled.convert[number](changed)
            fixed = alone.fixed
            if jax.tree.leaves(fixed):
                fixed = compiled.fixed[number](spec.start(compiled.whole[number]))
            state = TrainState(*changed, fixed=fixed)
        else:
            step, start = 0, spec.start(compiled.whole[number])
            state = compiled.create[number](start, config.random_seed)

        def restore(step: int) -> tuple[SavedState, dict[str, Any]]:
            with jax.set_mesh(mesh):
                state, before = checkpoints.restore(step, saved)
                return compiled.convert[number](state), before

        trainer = Trainer(spec, model, text_format, checkpoints, step, facts, mesh.size, restore)
        stack.pop_all()  # the trainer closes its checkpoints from now on
        return trainer, state


def _with_newer_settings(kind: type, config: dict[str, Any]) -> dict[str, Any]:
    """The settings in a checkpoint, of a configuration of this type, with those that xelm did not
    have yet as they are by default."""
    try:
        return to_json(from_json(kind, config))
    except UserError:
        return config


def _check_same_training(wanted: dict[str, Any], found: dict[str, Any], directory: Path) -> None:
    """Raises UserError unless a checkpoint is of this training, but for its runtime settings."""
    if found.get("state") != wanted["state"]:
        raise UserError(
            f"{directory} contains an unfinished training of another version of xelm; finish it "
            "with that, or delete the folder to start over"
        )
    kinds = {"config": TrainConfig, "model": ModelConfig}
    found = found | {part: _with_newer_settings(kind, found[part]) for part, kind in kinds.items()}
    parts = [differences(found[part], wanted[part]) for part in ("config", "model")]
    differ = [each for part in parts for each in part if not each.startswith("runtime.")]
    if set(wanted["language_tokens"]) != set(found["language_tokens"]):
        differ.append("the languages differ")
    if differ:
        raise UserError(
            f"{directory} contains an unfinished training with other settings "
            f"({'; '.join(differ)}); use those again, or delete the folder to start over"
        )
