"""Compiled functions of experts that train in one program, each on its own part of the mesh."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xelm.models.config import ModelConfig
from xelm.models.parameters import by_path, shapes
from xelm.models.target import Target, target_of
from xelm.training.expert_axis import expert_mesh, stacked_shape
from xelm.training.master_weights import join_weights
from xelm.training.sharding import BATCH, parameter_shardings
from xelm.training.step import TrainState, TrainStep, norm
from xelm.training.trainable import Fixed, check_trainable
from xelm.training_config import TrainConfig

_RATES = ("learning_rate", "schedule", "warmup_share", "decay_share", "final_rate_share")
_LOGISTICS = (
    *("skip_limit", "checkpoint_every", "keep_checkpoints", "keep_every", "log_every"),
    *("mesh_expert", "mesh_data", "mesh_fsdp", "mesh_tensor", "tensorboard", "wandb"),
)
"""Settings of OptimizerConfig and RuntimeConfig that no compiled function depends on."""


class CompiledSteps(NamedTuple):
    """Compiled functions of one model shape, and where their arrays lie. "Stacked" arrays are those
    of all experts, by `expert_axis.stack`."""

    create: tuple[Any, ...]
    """For each expert a function: (float32 parameters of the whole model, random seed of adapters)
    -> its TrainState"""
    convert: tuple[Any, ...]
    """For each expert a function: its SavedState in other dtypes -> its SavedState"""
    fixed: tuple[Any, ...]
    """For each expert a function: float32 parameters of the whole model -> what no step changes"""
    completed: tuple[Any, ...]
    """For each expert a function: (its float32 trained parameters, those of the whole model that it
    started from) -> those of the whole model, where layers are frozen"""
    step: Any
    """(stacked TrainState, batches, learning rates [E]) -> (stacked TrainState in the same memory,
    StepMetrics of [E])"""
    measure: Any
    """(stacked TrainState, batches) -> sums of losses and numbers of targets of the rows, as
    `TrainStep.measure`, [E * rows] each"""
    finite: Any
    """stacked parameters -> whether all of an expert are finite, [E]"""
    master_weights: Any
    """(parameters, remainders) of an expert -> its float32 parameters"""
    whole: tuple[Any, ...]
    """For each expert the shardings of the float32 parameters of a whole model."""
    state: TrainState
    """Shapes and shardings of the stacked TrainState."""
    alone: tuple[TrainState, ...]
    """Shapes and shardings of the TrainState of each expert on its part of the mesh."""
    batch_sharding: NamedSharding
    """Sharding of the experts' batches, which follow one another along the first dimension."""


def compile_steps(
    model: ModelConfig, config: TrainConfig, mesh: Mesh, target: Target | None = None
) -> CompiledSteps:
    """The compiled functions of a training. Trainings that differ only in budget, learning rates,
    random seed, checkpoints or logs share them: they compile once in a process. target: the kind of
    device whose form the step has; None is that of the mesh."""
    same = TrainConfig(
        tokens=1,
        batch_size=config.batch_size,
        optimizer=_with_defaults(config.optimizer, _RATES),
        lora=config.lora,
        frozen_layers=config.frozen_layers,
        mixture=config.mixture,
        runtime=_with_defaults(config.runtime, _LOGISTICS),
    )
    return _compile_steps(model, same, mesh, target or target_of(mesh.devices.flat))


def _with_defaults(config: Any, names: Sequence[str]) -> Any:
    usual = type(config)()
    return replace(config, **{name: getattr(usual, name) for name in names})


@functools.lru_cache(maxsize=8)
def _compile_steps(
    model: ModelConfig, config: TrainConfig, mesh: Mesh, target: Target
) -> CompiledSteps:
    experts = mesh.shape["expert"]
    step = TrainStep(model, config, spread=mesh.size > experts, target=target)
    alone = tuple(state_of(model, config, expert_mesh(mesh, number)) for number in range(experts))
    parts = [expert_mesh(mesh, number) for number in range(experts)]
    whole = tuple(parameter_shardings(model, part) for part in parts)
    state = jax.tree.map(functools.partial(stacked_shape, mesh), alone[0])
    placed = _shardings(state)

    def each(states, batches, rates):
        one = jax.tree.map(lambda x, like: x.reshape(like.shape), states, alone[0])
        return jax.tree.map(jnp.atleast_1d, step(one, batches, rates[0]))

    def measure(states, batches):
        one = jax.tree.map(lambda x, like: x.reshape(like.shape), states, alone[0])
        return step.measure(one, batches)

    def finite(parameters):
        return jnp.isfinite(norm(parameters))[None]

    # Each expert's devices run a function on their own arrays: nothing can pass across.
    expert = PartitionSpec("expert")
    specs: dict[str, Any] = {"mesh": mesh, "in_specs": expert, "out_specs": expert}
    by_expert = functools.partial(jax.shard_map, **specs, axis_names={"expert"}, check_vma=False)

    return CompiledSteps(
        create=tuple(jax.jit(step.begin, out_shardings=_shardings(one)) for one in alone),
        convert=tuple(jax.jit(step.convert, out_shardings=_shardings(one.saved)) for one in alone),
        fixed=tuple(jax.jit(step.fixed, out_shardings=_shardings(one.fixed)) for one in alone),
        completed=tuple(jax.jit(step.completed, out_shardings=each) for each in whole),
        step=jax.jit(
            by_expert(each),
            donate_argnums=0,
            in_shardings=(placed, None, None),
            out_shardings=(placed, NamedSharding(mesh, expert)),
        ),
        measure=jax.jit(
            by_expert(measure),
            in_shardings=(placed, None),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        ),
        finite=jax.jit(by_expert(finite)),
        master_weights=jax.jit(join_weights),
        whole=whole,
        state=state,
        alone=alone,
        batch_sharding=NamedSharding(mesh, PartitionSpec(("expert", *BATCH))),
    )


def state_of(model: ModelConfig, config: TrainConfig, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the TrainState of an expert on its part of a mesh. Remainders, and
    averages of the shape of their parameters, lie where those do; every device has all the rest."""
    check_trainable(config, model)
    step = TrainStep(model, config, spread=mesh.size > 1)
    state = jax.eval_shape(step.begin, shapes(model))
    placed = parameter_shardings(model, mesh, state.parameters)
    everywhere = NamedSharding(mesh, PartitionSpec())
    moments = optax.tree_map_params(
        step.optimizer,
        lambda moment, like, sharding: sharding if moment.shape == like.shape else everywhere,
        state.optimizer,
        state.parameters,
        placed,
        transform_non_params=lambda _: everywhere,
    )
    shardings = TrainState(
        parameters=placed,
        remainders={path: by_path(placed)[path] for path in state.remainders},
        optimizer=moments,
        step=everywhere,
        guard=jax.tree.map(lambda _: everywhere, state.guard),
        fixed=Fixed(*(parameter_shardings(model, mesh, part) for part in state.fixed)),
    )
    return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, shardings)


def _shardings(state: Any) -> Any:
    return jax.tree.map(lambda array: array.sharding, state)
