"""The training loop: data, step, metrics, checkpoint. Several trainings of one model shape may
share one program; nothing here knows of clusters or registries."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from clustering.errors import UserError
from xelm.data.text_format import TextFormat
from xelm.models.config import ModelConfig
from xelm.training.compiled import compile_steps
from xelm.training.expert_axis import stack, unstack
from xelm.training.hosts import placed
from xelm.training.preemption import preemption
from xelm.training.sharding import make_mesh
from xelm.training.step import StepMetrics
from xelm.training.trainer import Trainer, TrainingSpec, resume


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """Result of a training."""

    parameters: Any
    """Nested dictionary of arrays on the devices of the training, float32."""
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
    compiled = compile_steps(model, config, mesh)
    with ExitStack() as opened:
        trainers, states = [], []
        for number, spec in enumerate(specs):
            trainer, state = resume(spec, model, text_format, compiled, number)
            trainers.append(opened.enter_context(closing(trainer)))
            states.append(state)
        opened.enter_context(jax.set_mesh(mesh))
        state, states = stack(states, compiled.state), []
        ending = opened.enter_context(preemption(", ".join(spec.label for spec in specs)))
        while active := {n: trainer for n, trainer in enumerate(trainers) if trainer.active}:
            batch, rates = _next_batch(trainers)
            batch = placed(batch, compiled.batch_sharding)
            state, metrics = compiled.step(state, batch, rates)
            ends = ending()
            for number, trainer in active.items():
                if ends or trainer.reports:
                    trainer.report(StepMetrics(*(np.asarray(each)[number] for each in metrics)))
            saving = {n: t for n, t in active.items() if (ends or t.saves) and not t.failed}
            finite = np.asarray(compiled.finite(state.parameters)) if saving else ()
            for number, trainer in saving.items():
                one = unstack(state, compiled.alone[number])
                trainer.save(one, bool(finite[number]))
            if ends:
                break
        for trainer in trainers:
            trainer.checkpoints.wait()
    results: list[Trained | UserError] = []
    for number, trainer in enumerate(trainers):
        one = unstack(state, compiled.alone[number])
        results.append(
            trainer.failed
            or Trained(
                parameters=compiled.master_weights(one.parameters, one.remainders),
                tokens=trainer.tokens,
                language_tokens=trainer.language_tokens,
            )
        )
    return results


def _next_batch(trainers: Sequence[Trainer]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Batches of all trainers, one after the other, and their learning rates. A trainer without
    further steps gets rows without text and a rate of 0, which change no parameter."""
    found = [trainer.next_batch() if trainer.active else None for trainer in trainers]
    like = next(batch for batch, _ in filter(None, found))
    empty = {name: np.zeros_like(array) for name, array in like.items()}
    parts, rates = zip(*(each or (empty, 0.0) for each in found))
    batch = {name: np.concatenate([part[name] for part in parts]) for name in like}
    return batch, np.asarray(rates, np.float32)
