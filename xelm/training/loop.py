"""The training loop: data, step, metrics, checkpoint, read straight down.

A plain language-model trainer: it receives parameters and documents, returns parameters, and knows
nothing of experts, clusters or registries.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from clustering.errors import UserError
from xelm.config import TrainConfig, to_json
from xelm.data.masking import Masking, hide
from xelm.data.rows import ORIGIN, Source, batches
from xelm.models.config import ModelConfig
from xelm.models.parameters import shapes
from xelm.training.account import Account
from xelm.training.checkpoint import Checkpoints
from xelm.training.metrics import MetricsLog
from xelm.training.optimizer import schedule
from xelm.training.preemption import preemption
from xelm.training.sharding import make_mesh
from xelm.training.step import Program, State, program

STATE = 2
"""What a checkpoint holds; 1 had no guard."""


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
    rates, mesh = schedule(config), make_mesh(config)
    facts = {
        "state": STATE,
        "config": to_json(config),
        "model": to_json(model),
        "language_tokens": {source.ids.language: 0 for source in sources},
    }
    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        functions = program(model, config, mesh)
        checkpoints = stack.enter_context(closing(_checkpoints(directory, config)))
        first, state, facts = _begun(start, model, facts, functions, checkpoints)
        if first:
            print(f"{label}: going on after step {first}", file=sys.stderr)
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
        log = MetricsLog(
            directory / "metrics.jsonl", last_step=first, tensorboard=config.tensorboard
        )
        seen = facts["language_tokens"]
        account = Account(log, config, model, label, first, seen, mesh.size)
        stack.enter_context(closing(account))
        asked_to_end = stack.enter_context(preemption(label))
        for step, batch in enumerate(rows, first + 1):
            account.count(batch)
            if masking is not None:
                batch = hide(batch, masking, config.mask_share, config.random_seed, step)
            arrays = {name: array for name, array in batch.items() if name not in ORIGIN}
            arrays = jax.device_put(arrays, functions.batch_sharding)
            state, metrics = functions.step(state, arrays, rates[step - 1])
            ending = asked_to_end()
            saving = ending or step % config.checkpoint_every == 0 or step == config.steps
            if saving or account.due(step):
                account.report(step, metrics, float(rates[step - 1]), batch)
            if saving:
                if not functions.sound(state.parameters):
                    raise account.diverged(f"its parameters are no numbers after step {step}")
                checkpoints.save(step, state, {**facts, "language_tokens": dict(account.seen)})
            if ending:
                break
        checkpoints.wait()
    return Trained(
        parameters=state.parameters,
        tokens=sum(account.seen.values()),
        language_tokens=dict(account.seen),
    )


def _checkpoints(directory: Path, config: TrainConfig) -> Checkpoints:
    return Checkpoints(directory / "checkpoints", config.keep_checkpoints, config.keep_every)


def _begun(
    start: Callable[[Any], Any],
    model: ModelConfig,
    facts: dict[str, Any],
    functions: Program,
    checkpoints: Checkpoints,
) -> tuple[int, State, dict[str, Any]]:
    """Steps done, state and facts: of the newest checkpoint, or of a training that begins now."""
    found = checkpoints.newest(
        jax.eval_shape(functions.create, shapes(model)),
        functions.state_shardings,
        check=lambda found: _same_training(facts, found, checkpoints.directory.parent),
    )
    return found or (0, functions.create(start(functions.state_shardings.parameters)), facts)


def _same_training(wanted: dict[str, Any], found: dict[str, Any], directory: Path) -> None:
    if found.get("state", 1) != wanted["state"]:
        raise UserError(
            f"{directory} holds an unfinished training of another version of xelm; finish it with "
            "that, or delete the folder to start over"
        )
    free = (
        *("log_every", "checkpoint_every", "keep_checkpoints", "keep_every"),
        *("tensorboard", "skip_limit"),
    )
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
