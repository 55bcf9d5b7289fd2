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
    """int32, steps done."""


class Metrics(NamedTuple):
    """What a step reports: mean loss in nats a token, gradient norm before clipping, targets."""

    loss: jax.Array
    grad_norm: jax.Array
    tokens: jax.Array


class Program(NamedTuple):
    """Compiled functions and shardings of one model shape on one mesh."""

    create: Any
    """parameters -> State"""
    step: Any
    """(State, batch, learning rate) -> (State, Metrics); the old State is given up."""
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
        return State(parameters, update.init(parameters), jnp.zeros((), jnp.int32))

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
        gradients, norm = clipped(gradients, clip)
        updates, optimizer_state = update.update(gradients, state.optimizer, state.parameters)
        updates = jax.tree.map(lambda u: u * learning_rate, updates)
        parameters = optax.apply_updates(state.parameters, updates)
        metrics = Metrics(loss, norm, tokens)
        return State(parameters, optimizer_state, state.step + 1), metrics

    placed = parameter_shardings(model, mesh)
    whole = replicated(mesh)
    # Only the structure of the optimiser's state is wanted, so any shape of a parameter will do.
    abstract = jax.eval_shape(
        create, jax.tree.map(lambda s: jax.ShapeDtypeStruct((1,), jnp.float32), placed)
    )
    optimizer_shardings = optax.tree_map_params(
        update,
        lambda _, sharding: sharding,
        abstract.optimizer,
        placed,
        transform_non_params=lambda _: whole,
    )
    shardings = State(placed, optimizer_shardings, whole)
    return Program(
        create=jax.jit(create, out_shardings=shardings),
        step=jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, None, None),
            out_shardings=(shardings, whole),
        ),
        state_shardings=shardings,
        batch_sharding=NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"))),
    )


def target_weights(segments):
    """bool [..., T]: whether each next token is a target: of the same document, and no padding."""
    return (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)
