"""The state of a training and the one compiled step that advances it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from xelm.config import TrainConfig
from xelm.models.config import ModelConfig
from xelm.models.parameters import bind, graph
from xelm.training import guard as guards
from xelm.training.loss import cross_entropy
from xelm.training.optimizer import clipped, optimizer
from xelm.training.sharding import BATCH, parameter_shardings, replicated


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
    """Compiled functions and shardings of one model shape on one mesh."""

    create: Any
    """parameters -> State"""
    step: Any
    """(State, batch, learning rate) -> (State, Metrics); the old State is given up."""
    sound: Any
    """parameters -> whether all are numbers"""
    state_shardings: State
    batch_sharding: NamedSharding


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
    shape = graph(model, dtype)

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
        )
        if not model.causal:  # few are asked for, and vocabularies are large
            hidden = jnp.take_along_axis(hidden, part["places"][..., None], axis=1)
        states, head = network.output(hidden)
        return cross_entropy(states, head, targets, weights_of(part) / total)

    def weights_of(part):
        return target_weights(part["segments"]) if model.causal else part["chosen"]

    def step(state, batch, learning_rate):
        parts = jax.tree.map(
            lambda x: x.reshape(accumulation, x.shape[0] // accumulation, *x.shape[1:]), batch
        )
        parts = jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, BATCH))
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

    whole = replicated(mesh)
    shardings = _shardings(model, mesh, update, create)
    return Program(
        create=jax.jit(create, out_shardings=shardings),
        step=jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, None, None),
            out_shardings=(shardings, whole),
        ),
        sound=jax.jit(lambda parameters: jnp.isfinite(optax.tree.norm(parameters))),
        state_shardings=shardings,
        batch_sharding=NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"))),
    )


def _shardings(model: ModelConfig, mesh: Mesh, update: Any, create: Any) -> State:
    """Averages lie where their parameters do; every device holds the rest whole."""
    placed, whole = parameter_shardings(model, mesh), replicated(mesh)
    # Only the structure of the optimiser's state is wanted, so any shape of a parameter will do.
    abstract = jax.eval_shape(
        create, jax.tree.map(lambda s: jax.ShapeDtypeStruct((1,), jnp.float32), placed)
    )
    moments = optax.tree_map_params(
        update,
        lambda _, sharding: sharding,
        abstract.optimizer,
        placed,
        transform_non_params=lambda _: whole,
    )
    return State(placed, moments, whole, jax.tree.map(lambda _: whole, abstract.guard))


def target_weights(segments):
    """bool [..., T]: whether each next token is a target: of the same document, and no padding."""
    return (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)
