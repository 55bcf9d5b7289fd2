"""The training loop: data, step, metrics, checkpoint. Several trainings of one model shape may
share one program; nothing here knows of clusters or registries."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from clustering.errors import UserError
from xelm.data.text_format import TextFormat
from xelm.models.config import ModelConfig
from xelm.training.compiled import CompiledSteps, compile_steps
from xelm.training.expert_axis import stack, unstack
from xelm.training.hosts import is_first, placed
from xelm.training.memory import check_memory
from xelm.training.preemption import preemption
from xelm.training.sharding import make_mesh
from xelm.training.step import StepMetrics, TrainState
from xelm.training.trainer import Trainer, TrainingSpec, resume


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """Result of a training."""

    parameters: Any
    """Nested dictionary of arrays on the devices of the training, float32; with adapters, their
    factors alone."""
    tokens: int
    """Targets predicted over all steps (of an encoder, tokens read)."""
    language_tokens: Mapping[str, int]
    """The same by language."""


def train(spec: TrainingSpec, model: ModelConfig, text_format: TextFormat) -> Trained:
    """Trains on packed rows of the sources and returns the new parameters.

    After a crash, the same call resumes from the newest checkpoint in the directory and ends, on
    CPUs, with the same bits. Raises DivergedError where further steps are useless, and Preempted if
    the process was stopped by a signal.
    """
    (found,) = train_together([spec], model, text_format)
    if isinstance(found, UserError):
        raise found
    return found


def train_together(
    specs: Sequence[TrainingSpec], model: ModelConfig, text_format: TextFormat
) -> list[Trained | UserError]:
    """Runs several trainings in one program, each on its own part of the mesh (axis `expert`), and
    returns the result of each, or why it was given up. They may differ in initial parameters, text,
    token budget and directory only, and each ends with the parameters that it would have alone."""
    config = specs[0].config
    if any(replace(spec.config, tokens=config.tokens) != config for spec in specs):
        raise ValueError("trainings of one program have the same settings but for tokens")
    mesh = make_mesh(config, len(specs))
    labels = ", ".join(spec.label for spec in specs)
    if config.runtime.dtype != "float32" and mesh.devices.flat[0].platform == "cpu" and is_first():
        # benchmarks/memory.py: 1.3 times the memory. CPUs convert to float32 before each product.
        print(
            f"{labels}: on a CPU, training in {config.runtime.dtype} takes more memory than in "
            "float32; set runtime.dtype=float32",
            file=sys.stderr,
        )
    check_memory(model, config, mesh)
    compiled = compile_steps(model, config, mesh)
    with ExitStack() as opened:
        trainers, states = [], []
        for number, spec in enumerate(specs):
            trainer, state = resume(spec, model, text_format, compiled, number)
            trainers.append(opened.enter_context(closing(trainer)))
            states.append(state)
        opened.enter_context(jax.set_mesh(mesh))
        state, states = stack(states, compiled.state), []
        ending = opened.enter_context(preemption(labels))
        _measure(trainers, compiled, state)
        while active := {n: trainer for n, trainer in enumerate(trainers) if trainer.active}:
            batch, rates = _next_batch(trainers)
            batch = placed(batch, compiled.batch_sharding)
            state, metrics = compiled.step(state, batch, rates)
            ends = ending()
            for number, trainer in active.items():
                if ends or trainer.reports:
                    trainer.report(StepMetrics(*(np.asarray(each)[number] for each in metrics)))
            _measure(trainers, compiled, state)
            saving = {n: t for n, t in active.items() if (ends or t.saves) and not t.failed}
            finite = np.asarray(compiled.finite(state.parameters)) if saving else ()
            for number, trainer in saving.items():
                one = unstack(state, compiled.alone[number])
                trainer.save(one, bool(finite[number]))
            if ends:
                break
        for trainer in trainers:
            trainer.checkpoints.wait()
    last = [unstack(state, alone) for alone in compiled.alone]
    return [
        trainer.failed or _trained(trainer, specs[n], compiled, n, last[n])
        for n, trainer in enumerate(trainers)
    ]


def _trained(
    trainer: Trainer, spec: TrainingSpec, compiled: CompiledSteps, number: int, last: TrainState
) -> Trained | UserError:
    """The result of a trainer that is done, or why there is none. last: its state after its last
    step."""
    try:
        state = trainer.result(last.saved)
    except UserError as error:
        return error
    parameters = compiled.master_weights(state.parameters, state.remainders)
    if spec.config.frozen_layers is not None or spec.config.mixture.trained == "router":
        start = spec.start(compiled.whole[number])
        parameters = compiled.completed[number](parameters, start)
    return Trained(
        parameters=parameters,
        tokens=trainer.tokens,
        language_tokens=trainer.language_tokens,
    )


def _measure(trainers: Sequence[Trainer], compiled: CompiledSteps, state: TrainState) -> None:
    """Measures those trainers on their held-out text that are to be measured now."""
    measuring = [trainer if trainer.measures else None for trainer in trainers]
    texts = [trainer.held_out.batches if trainer else [] for trainer in measuring]
    sums: list[list[Any]] = []
    for parts in itertools.zip_longest(*texts):
        batch = _joined(parts)
        sums.append(compiled.measure(state, placed(batch, compiled.batch_sharding)))
    if not sums:
        return
    # [batches, experts * rows] -> [experts, batches * rows]
    rows = [np.stack([np.asarray(each, np.float64) for each in part]) for part in zip(*sums)]
    nats, targets = (
        np.concatenate(np.split(part, len(trainers), axis=1)).reshape(len(trainers), -1)
        for part in rows
    )
    for number, trainer in enumerate(measuring):
        if trainer:
            trainer.measured(nats[number], targets[number])


def _next_batch(trainers: Sequence[Trainer]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Batches of all trainers, one after the other, and their learning rates. A trainer without
    further steps gets rows without text and a rate of 0, which change no parameter."""
    found = [trainer.next_batch() if trainer.active else None for trainer in trainers]
    batch = _joined([each and each[0] for each in found])
    return batch, np.asarray([each[1] if each else 0.0 for each in found], np.float32)


def _joined(parts: Sequence[Mapping[str, np.ndarray] | None]) -> dict[str, np.ndarray]:
    """The batches of all trainers, one after the other; None is one of empty rows."""
    like = next(filter(None, parts))
    empty = {name: np.zeros_like(array) for name, array in like.items()}
    return {name: np.concatenate([(part or empty)[name] for part in parts]) for name in like}
