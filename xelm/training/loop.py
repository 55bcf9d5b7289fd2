"""The training loop: data, step, metrics, checkpoint, read straight down.

A plain language-model trainer: it receives parameters and documents, returns parameters, and knows
nothing of clusters or registries. Several trainings of one shape go side by side in one program.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from clustering.errors import UserError
from xelm.models.config import ModelConfig
from xelm.training.course import Course, Text, Training, begun
from xelm.training.hosts import placed
from xelm.training.preemption import preemption
from xelm.training.program import Program, program
from xelm.training.sharding import make_mesh
from xelm.training.step import Metrics, State


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a training leaves."""

    parameters: Any
    """Nested dictionary of arrays on the devices of the training, float32."""
    tokens: int
    """Targets predicted, over all steps; by an encoder, tokens read."""
    language_tokens: Mapping[str, int]
    """The same by language."""


def train(training: Training, model: ModelConfig, text: Text) -> Trained:
    """Trains on packed rows of the sources and returns the new parameters.

    Run again with the same arguments after a crash, a training goes on from the newest checkpoint
    in its directory and ends, on CPUs, with the same bits. Raises DivergedError where steps are no
    use any more, and Preempted if the process was asked to end.
    """
    (found,) = train_together([training], model, text)
    if isinstance(found, UserError):
        raise found
    return found


def train_together(
    trainings: Sequence[Training], model: ModelConfig, text: Text
) -> list[Trained | UserError]:
    """Several trainings in one program, each on its own part of the mesh (axis `expert`), with what
    became of each. They differ in what they start from, text, budget and directory alone.

    Each ends as it would alone. Those that are done, or given up, wait for the others.
    """
    config = trainings[0].config
    if any(replace(training.config, tokens=config.tokens) != config for training in trainings):
        raise ValueError("trainings of one program have the same settings but for tokens")
    mesh = make_mesh(config, len(trainings))
    functions = program(model, config, mesh)
    with ExitStack() as stack:
        courses, states = [], []
        for number, training in enumerate(trainings):
            course, state = begun(training, model, text, functions, number)
            courses.append(stack.enter_context(closing(course)))
            states.append(state)
        stack.enter_context(jax.set_mesh(mesh))
        state, states = functions.side_by_side(states), []
        labels = ", ".join(training.label for training in trainings)
        asked_to_end = stack.enter_context(preemption(labels))
        while any(course.going for course in courses):
            going = [(number, course) for number, course in enumerate(courses) if course.going]
            batch, rates = _batch(courses)
            batch = placed(batch, functions.batch_sharding)
            state, metrics = functions.step(state, batch, rates)
            ending = asked_to_end()
            for number, course in going:
                if ending or course.reports():
                    course.report(Metrics(*(np.asarray(each)[number] for each in metrics)))
            saving = [(n, c) for n, c in going if (ending or c.saves()) and not c.failed]
            sound = np.asarray(functions.sound(state.parameters)) if saving else ()
            for number, course in saving:
                course.save(functions.of_expert(state, number), bool(sound[number]))
            if ending:
                break
        for course in courses:
            course.wait()
    return [
        course.failed or _trained(course, functions, functions.of_expert(state, number))
        for number, course in enumerate(courses)
    ]


def _batch(courses: Sequence[Course]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Batches and rates of the next step of each; of those that go no further, rows without text
    and a rate of 0, which change no parameter."""
    found = [course.next() if course.going else None for course in courses]
    like = next(batch for batch, _ in filter(None, found))
    empty = {name: np.zeros_like(array) for name, array in like.items()}
    parts = [(empty, 0.0) if each is None else each for each in found]
    batch = {name: np.concatenate([part[name] for part, _ in parts]) for name in like}
    return batch, np.asarray([rate for _, rate in parts], np.float32)


def _trained(course: Course, functions: Program, state: State) -> Trained:
    return Trained(
        parameters=functions.masters(state.parameters, state.rests),
        tokens=sum(course.seen.values()),
        language_tokens=course.seen,
    )
