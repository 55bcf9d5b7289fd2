"""The training loop: data, step, metrics, checkpoint, read straight down.

A plain language-model trainer: it receives parameters and documents, returns parameters, and knows
nothing of experts, clusters or registries.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clustering.errors import UserError
from xelm.config import TrainConfig, to_json
from xelm.data.masking import Masking, hide
from xelm.data.rows import Source, batches
from xelm.models.config import ModelConfig
from xelm.models.parameters import shapes
from xelm.progress import bar
from xelm.training.checkpoint import Checkpoints
from xelm.training.metrics import MetricsLog
from xelm.training.optimizer import schedule
from xelm.training.sharding import make_mesh
from xelm.training.step import program


class DivergedError(UserError):
    """The loss or its gradient is no number any more; the settings do not suit the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a training leaves."""

    parameters: Any
    """Nested dictionary of arrays on the devices of the training, float32."""
    tokens: int
    """Targets predicted, over all steps; by an encoder, tokens read."""
    language_tokens: Mapping[str, int]
    """The same by language."""


def train(
    start: Callable[[Any], Any],
    model: ModelConfig,
    sources: Sequence[Source],
    config: TrainConfig,
    directory: str | Path,
    *,
    start_id: int,
    end_id: int,
    masking: Masking | None = None,
    label: str,
) -> Trained:
    """Trains on packed rows of `sources` and returns the new parameters.

    `directory` holds checkpoints and metrics.jsonl; run again with the same arguments after a
    crash, the training goes on from the newest checkpoint and ends, on CPUs, with the same bits.
    start(shardings) gives the parameters (nested dictionary, float32) that a training without a
    checkpoint begins with, each on the devices that its sharding says. masking: of an encoder.
    """
    directory = Path(directory)
    languages = [source.ids.language for source in sources]
    rates = schedule(config)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh), closing(Checkpoints(directory / "checkpoints")) as checkpoints:
        functions = program(model, config, mesh)
        facts = {
            "config": to_json(config),
            "model": to_json(model),
            "language_tokens": dict.fromkeys(languages, 0),
        }
        first, state, facts = checkpoints.newest(
            jax.eval_shape(functions.create, shapes(model)),
            functions.state_shardings,
            check=lambda found: _same_training(facts, found, directory),
        ) or (
            0,
            functions.create(start(functions.state_shardings.parameters)),
            facts,
        )
        if first:
            print(f"{label}: going on after step {first}", file=sys.stderr)
        log = MetricsLog(
            directory / "metrics.jsonl", last_step=first, tensorboard=config.tensorboard
        )
        rows = batches(
            list(sources),
            steps=config.steps,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            start_id=start_id,
            end_id=end_id,
            random_seed=config.random_seed,
            first_step=first,
        )
        seen = facts["language_tokens"]
        with closing(log), bar(config.steps * config.tokens_per_step, label, "tok") as progress:
            progress.update(first * config.tokens_per_step)
            clock, since = time.perf_counter(), sum(seen.values())
            for step in range(first + 1, config.steps + 1):
                batch = next(rows)
                _count(seen, languages, batch, model.causal)
                if masking is not None:
                    batch = hide(batch, masking, config.mask_share, config.random_seed, step)
                arrays = {k: v for k, v in batch.items() if k != "language"}
                arrays = jax.device_put(arrays, functions.batch_sharding)
                state, metrics = functions.step(state, arrays, rates[step - 1])
                progress.update(config.tokens_per_step)
                last = step == config.steps
                logged = step % config.log_every == 0 or last
                saved = step % config.checkpoint_every == 0 or last
                if logged or saved or step == 1:
                    loss, norm = float(metrics.loss), float(metrics.grad_norm)
                    _check_finite(loss, norm, step, label, config.learning_rate)
                if logged:
                    now, total = time.perf_counter(), sum(seen.values())
                    log.write(
                        {
                            "step": step,
                            "tokens": total,
                            "loss": loss,
                            "learning_rate": float(rates[step - 1]),
                            "grad_norm": norm,
                            "tokens_per_second": (total - since) / (now - clock),
                            "language_tokens": dict(seen),
                        }
                    )
                    clock, since = now, total
                    progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
                if saved:
                    checkpoints.save(step, state, {**facts, "language_tokens": dict(seen)})
        checkpoints.wait()
    return Trained(
        parameters=state.parameters, tokens=sum(seen.values()), language_tokens=dict(seen)
    )


def _check_finite(loss: float, norm: float, step: int, label: str, rate: float) -> None:
    if math.isfinite(loss + norm):
        return
    if step == 1:
        raise UserError(
            f"the loss of {label} is {loss:g} and its gradient norm {norm:g} before anything was "
            "learned: look at what it starts from"
        )
    raise DivergedError(
        f"the training of {label} has diverged: loss {loss:g} and gradient norm {norm:g} at step "
        f"{step}; a peak rate of {rate:g} is too much for it"
    )


def _count(
    seen: dict[str, int], languages: Sequence[str], batch: Mapping[str, np.ndarray], causal: bool
) -> None:
    segments = batch["segments"]
    targets = segments[:, :-1] > 0
    if causal:
        targets = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    for index, count in zip(batch["language"], targets.sum(axis=1)):
        seen[languages[int(index)]] += int(count)


def _same_training(wanted: dict[str, Any], found: dict[str, Any], directory: Path) -> None:
    free = ("log_every", "checkpoint_every", "tensorboard")
    differ = [
        f"{name} was {found[part].get(name)}, now {value}"
        for part in ("config", "model")
        for name, value in wanted[part].items()
        if name not in free and found[part].get(name) != value
    ]
    if set(wanted["language_tokens"]) != set(found["language_tokens"]):
        differ.append("the languages differ")
    if differ:
        raise UserError(
            f"{directory} holds an unfinished training with other settings ({'; '.join(differ)}); "
            f"use those again, or delete the folder to start over"
        )
