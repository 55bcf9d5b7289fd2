"""The state of a training and the one compiled step that advances it."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xelm.config import TrainConfig
from xelm.models.config import ModelConfig
from xelm.models.parameters import bind, graph, shapes
from xelm.training import guard as guards
from xelm.training.loss import cross_entropy
from xelm.training.optimizer import clipped, optimizer
from xelm.training.sharding import (
    BATCH,
    mesh_of,
    of_expert,
    parameter_shardings,
    replicated,
    side_by_side,
    spread_lookup,
    stacked,
)


class State(NamedTuple):
    """All that a step changes."""

    parameters: Any
    """Nested dictionary, float32."""
    optimizer: Any
    """Of optax."""
    step: Any
    """int32, steps done, those that were skipped included."""
    guard: Any
    """`Guard`."""


class Metrics(NamedTuple):
    """What a step reports."""

    loss: jax.Array
    """Mean of the targets, nats."""
    grad_norm: jax.Array
    """Before clipping."""
    skipped: jax.Array
    """int32, steps that were skipped so far."""
    most_in_a_row: jax.Array
    """int32, of those the most without one made between them."""


class Program(NamedTuple):
    """Compiled functions of one model shape, and where arrays lie, for experts that train side by
    side: each on its part of the mesh, and nothing passes from one to another."""

    create: tuple[Any, ...]
    """Of each expert: parameters -> State"""
    step: Any
    """(States, batches, learning rates [E]) -> (States, Metrics of [E]) of experts side by side;
    the old States are given up."""
    sound: Any
    """parameters side by side -> whether all of an expert are numbers, [E]"""
    state: State
    """Shapes and shardings of experts side by side."""
    state_shapes: State
    """Of one expert."""
    state_shardings: tuple[State, ...]
    """Of each expert alone."""
    batch_sharding: NamedSharding
    """Of batches, one after the other."""

    def side_by_side(self, states: Sequence[State]) -> State:
        """The experts' States as the one that a step advances."""
        return side_by_side(states, self.state)

    def of_expert(self, states: State, number: int) -> State:
        """One expert's State out of it, in the same memory."""
        return of_expert(states, number, self.state_shapes, self.state_shardings[number])


def program(model: ModelConfig, config: TrainConfig, mesh: Mesh) -> Program:
    """The program of a training. Trainings that differ in budget, rate, schedule, random seed or
    logging alone share one: it compiles once a process."""
    return _program(
        model,
        mesh,
        (
            config.accumulation_steps,
            config.dtype,
            config.rematerialise,
            config.beta1,
            config.beta2,
            config.clip_norm,
            config.weight_decay,
        ),
    )


@functools.lru_cache(maxsize=8)
def _program(model: ModelConfig, mesh: Mesh, settings: tuple) -> Program:
    accumulation, dtype, rematerialise, beta1, beta2, clip, decay = settings
    update = optimizer(TrainConfig(tokens=1, beta1=beta1, beta2=beta2, weight_decay=decay))
    shape, experts = graph(model, dtype), mesh.shape["expert"]

    def create(parameters):
        step = jnp.zeros((), jnp.int32)
        return State(parameters, update.init(parameters), step, guards.fresh())

    def mean_loss(parameters, part, total):
        network = bind(shape, parameters)
        if model.causal:
            read = {name: part[name][:, :-1] for name in ("tokens", "positions", "segments")}
            targets = part["tokens"][:, 1:]
        else:
            read = {**part, "tokens": part["inputs"]}
            targets = jnp.take_along_axis(part["tokens"], part["places"], axis=1)
        hidden = network.hidden(
            read["tokens"],
            positions=read["positions"],
            segments=read["segments"],
            remat=rematerialise,
            lookup=spread_lookup,
        )
        if not model.causal:  # few are asked for, and vocabularies are large
            hidden = jnp.take_along_axis(hidden, part["places"][..., None], axis=1)
        states, head = network.output(hidden)
        weights = weights_of(part) / total
        return cross_entropy(states, head, targets, weights, spread=mesh.size > experts)

    def weights_of(part):
        return target_weights(part["segments"]) if model.causal else part["chosen"]

    def step(state, batch, learning_rate):
        parts = jax.tree.map(
            lambda x: x.reshape(accumulation, x.shape[0] // accumulation, *x.shape[1:]), batch
        )
        parts = jax.lax.with_sharding_constraint(parts, PartitionSpec(None, BATCH))
        tokens = weights_of(batch).sum()
        # Of all parts: those with fewer targets weigh less, as in the whole batch. Batches of first
        # tokens alone have no target.
        total = jnp.maximum(tokens, 1).astype(jnp.float32)

        def accumulate(sums, part):
            found = jax.value_and_grad(mean_loss)(state.parameters, part, total)
            return jax.tree.map(jnp.add, sums, found), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.parameters))
        if accumulation == 1:
            (loss, gradients), _ = accumulate(zero, jax.tree.map(lambda x: x[0], parts))
        else:
            (loss, gradients), _ = jax.lax.scan(accumulate, zero, parts)
        norm = optax.tree.norm(gradients)
        made = guards.harmless(state.guard, loss, norm)

        def move(parameters, moments):
            updates, moments = update.update(clipped(gradients, norm, clip), moments, parameters)
            updates = jax.tree.map(lambda u: u * learning_rate, updates)
            return optax.apply_updates(parameters, updates), moments

        # A choice between whole states, element by element, would hold both.
        parameters, moments = jax.lax.cond(
            made, move, lambda *old: old, state.parameters, state.optimizer
        )
        guard = guards.after(state.guard, loss, made)
        metrics = Metrics(loss, norm, guard.skipped, guard.most_in_a_row)
        return State(parameters, moments, state.step + 1, guard), metrics

    shapes_of_state = jax.eval_shape(create, shapes(model))
    alone = tuple(
        _shardings(model, mesh_of(mesh, number), update, shapes_of_state)
        for number in range(experts)
    )
    whole = jax.tree.map(functools.partial(stacked, mesh), shapes_of_state, alone[0])
    placed = jax.tree.map(lambda array: array.sharding, whole)
    scalar = NamedSharding(mesh, PartitionSpec("expert"))

    def each(states, batches, rates):
        state = jax.tree.map(lambda x, like: x.reshape(like.shape), states, shapes_of_state)
        return jax.tree.map(jnp.atleast_1d, step(state, batches, rates[0]))

    def sound(parameters):
        return jnp.isfinite(optax.tree.norm(parameters))[None]

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
        create=tuple(jax.jit(create, out_shardings=placed) for placed in alone),
        step=jax.jit(
            by_expert(each),
            donate_argnums=0,
            in_shardings=(placed, None, None),
            out_shardings=(placed, scalar),
        ),
        sound=jax.jit(by_expert(sound)),
        state=whole,
        state_shapes=shapes_of_state,
        state_shardings=alone,
        batch_sharding=NamedSharding(mesh, PartitionSpec(("expert", *BATCH))),
    )


def _shardings(model: ModelConfig, mesh: Mesh, update: Any, state: State) -> State:
    """Of an expert alone: averages lie where their parameters do; every device holds the rest
    whole."""
    placed, whole = parameter_shardings(model, mesh), replicated(mesh)
    moments = optax.tree_map_params(
        update,
        lambda _, sharding: sharding,
        state.optimizer,
        placed,
        transform_non_params=lambda _: whole,
    )
    return State(placed, moments, whole, jax.tree.map(lambda _: whole, state.guard))


def target_weights(segments):
    """bool [..., T]: whether each next token is a target: of the same document, and no padding."""
    return (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)
