"""The compiled step of experts side by side: each on its part of the mesh, and nothing passes from
one to another."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xelm.config import TrainConfig
from xelm.models.config import ModelConfig
from xelm.models.parameters import by_path, shapes
from xelm.training.masters import whole
from xelm.training.sharding import (
    BATCH,
    mesh_of,
    of_expert,
    parameter_shardings,
    replicated,
    side_by_side,
    stacked,
)
from xelm.training.step import State, Step, norm

_RATES = ("learning_rate", "schedule", "warmup_share", "decay_share", "final_rate_share")
_LOGISTICS = (
    *("skip_limit", "checkpoint_every", "keep_checkpoints", "keep_every", "log_every"),
    *("mesh_expert", "mesh_data", "mesh_fsdp", "mesh_tensor", "tensorboard", "wandb"),
)
"""Settings of OptimizerConfig and RuntimeConfig that no compiled function depends on."""


class Program(NamedTuple):
    """Compiled functions of one model shape, and where arrays lie, for experts that train side by
    side."""

    create: tuple[Any, ...]
    """Of each expert: float32 parameters -> State"""
    adopt: tuple[Any, ...]
    """Of each expert: its State in other dtypes -> State"""
    step: Any
    """(States, batches, learning rates [E]) -> (States, Metrics of [E]) of experts side by side;
    the old States are given up."""
    sound: Any
    """parameters side by side -> whether all of an expert are numbers, [E]"""
    masters: Any
    """(parameters, rests) of an expert -> its float32 parameters"""
    state: State
    """Shapes and shardings of experts side by side."""
    alone: tuple[State, ...]
    """The same of each expert on its part."""
    batch_sharding: NamedSharding
    """Of batches, one after the other."""

    def side_by_side(self, states: Sequence[State]) -> State:
        """The experts' States as the one that a step advances."""
        return side_by_side(states, self.state)

    def of_expert(self, states: State, number: int) -> State:
        """One expert's State out of it, in the same memory."""
        return of_expert(states, self.alone[number])


def program(model: ModelConfig, config: TrainConfig, mesh: Mesh) -> Program:
    """The program of a training. Trainings that differ in budget, rate, schedule, random seed or
    logging alone share one: it compiles once a process."""
    same = TrainConfig(
        tokens=1,
        batch_size=config.batch_size,
        optimizer=_with_defaults(config.optimizer, _RATES),
        runtime=_with_defaults(config.runtime, _LOGISTICS),
    )
    return _program(model, same, mesh)


def _with_defaults(config: Any, names: Sequence[str]) -> Any:
    usual = type(config)()
    return replace(config, **{name: getattr(usual, name) for name in names})


@functools.lru_cache(maxsize=8)
def _program(model: ModelConfig, config: TrainConfig, mesh: Mesh) -> Program:
    experts = mesh.shape["expert"]
    step = Step(model, config, spread=mesh.size > experts)
    alone = tuple(state_of(model, config, mesh_of(mesh, number)) for number in range(experts))
    state = jax.tree.map(functools.partial(stacked, mesh), alone[0])
    placed = _shardings(state)

    def each(states, batches, rates):
        one = jax.tree.map(lambda x, like: x.reshape(like.shape), states, alone[0])
        return jax.tree.map(jnp.atleast_1d, step(one, batches, rates[0]))

    def sound(parameters):
        return jnp.isfinite(norm(parameters))[None]

    def by_expert(function):
        # Each expert's devices run the function on what they hold: across, nothing can pass.
        expert = PartitionSpec("expert")
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=expert,
            out_specs=expert,
            axis_names={"expert"},
            check_vma=False,
        )

    return Program(
        create=tuple(jax.jit(step.begin, out_shardings=_shardings(one)) for one in alone),
        adopt=tuple(jax.jit(step.adopt, out_shardings=_shardings(one)) for one in alone),
        step=jax.jit(
            by_expert(each),
            donate_argnums=0,
            in_shardings=(placed, None, None),
            out_shardings=(placed, NamedSharding(mesh, PartitionSpec("expert"))),
        ),
        sound=jax.jit(by_expert(sound)),
        masters=jax.jit(whole),
        state=state,
        alone=alone,
        batch_sharding=NamedSharding(mesh, PartitionSpec(("expert", *BATCH))),
    )


def state_of(model: ModelConfig, config: TrainConfig, mesh: Mesh) -> State:
    """Shapes and shardings of the state of an expert on a mesh of one. Rests, and averages of the
    shape of their parameters, lie where those do; every device holds what else there is, which is
    little, whole."""
    step = Step(model, config, spread=mesh.size > 1)
    state = jax.eval_shape(step.begin, shapes(model))
    placed, everywhere = parameter_shardings(model, mesh), replicated(mesh)
    moments = optax.tree_map_params(
        step.optimizer,
        lambda moment, like, sharding: sharding if moment.shape == like.shape else everywhere,
        state.optimizer,
        state.parameters,
        placed,
        transform_non_params=lambda _: everywhere,
    )
    shardings = State(
        parameters=placed,
        rests={path: by_path(placed)[path] for path in state.rests},
        optimizer=moments,
        step=everywhere,
        guard=jax.tree.map(lambda _: everywhere, state.guard),
    )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        shardings,
    )


def _shardings(state: State) -> State:
    return jax.tree.map(lambda array: array.sharding, state)
