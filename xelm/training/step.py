"""The state of a training, and what one step makes of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from xelm.config import TrainConfig
from xelm.models.config import ModelConfig
from xelm.models.parameters import bind, graph
from xelm.training import guard as guards
from xelm.training.loss import cross_entropy
from xelm.training.masters import Rests, halved, whole
from xelm.training.optimizer import clipped, optimizer
from xelm.training.sharding import BATCH, spread_lookup, states_at


class State(NamedTuple):
    """All that a step changes."""

    parameters: Any
    """Nested dictionary; float32, or with matrices in bfloat16."""
    rests: Rests
    """What those matrices lack of their float32 masters."""
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


@dataclass(frozen=True)
class Step:
    """One expert's step, for `jax.jit`."""

    model: ModelConfig
    config: TrainConfig
    spread: bool
    """Whether over several devices: those of the mesh that is set."""

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """What moves the parameters."""
        return optimizer(self.config)

    def begin(self, masters: Mapping[str, Any]) -> State:
        """The state before the first step, of float32 parameters."""
        parameters, rests = halved(masters, self.config.runtime.dtype)
        step = jnp.zeros((), jnp.int32)
        return State(parameters, rests, self.optimizer.init(masters), step, guards.fresh())

    def adopt(self, state: State) -> State:
        """The state of a training in other dtypes, in these."""
        masters = whole(state.parameters, state.rests)
        like = jax.eval_shape(self.optimizer.init, masters)
        moments = jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), state.optimizer, like)
        parameters, rests = halved(masters, self.config.runtime.dtype)
        return state._replace(parameters=parameters, rests=rests, optimizer=moments)

    def __call__(
        self, state: State, batch: Mapping[str, jax.Array], rate: jax.Array
    ) -> tuple[State, Metrics]:
        """The state after a step on rows of text at a learning rate."""
        loss, gradients = self._gradients(state.parameters, batch)
        size = norm(gradients)
        made = guards.harmless(state.guard, loss, size)

        def move(parameters, rests, moments):
            masters = whole(parameters, rests)
            scaled = clipped(gradients, size, self.config.optimizer.clip_norm)
            updates, moments = self.optimizer.update(scaled, moments, masters)
            updates = jax.tree.map(lambda u: u * rate, updates)
            masters = jax.tree.map(jnp.add, masters, updates)
            return *halved(masters, self.config.runtime.dtype), moments

        # A choice between whole states, element by element, would hold both.
        parameters, rests, moments = jax.lax.cond(
            made, move, lambda *old: old, state.parameters, state.rests, state.optimizer
        )
        guard = guards.after(state.guard, loss, made)
        metrics = Metrics(loss, size, guard.skipped, guard.most_in_a_row)
        return State(parameters, rests, moments, state.step + 1, guard), metrics

    def _gradients(self, parameters, batch):
        """Loss and gradients, in parts if so configured, summed in float32."""
        count = self.config.runtime.accumulation_steps
        # Of all parts: those with fewer targets weigh less, as in the whole batch. Batches of first
        # tokens alone have no target.
        total = jnp.maximum(self._weights(batch).sum(), 1).astype(jnp.float32)

        def of(part):
            return jax.value_and_grad(self._loss)(parameters, part, total)

        parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
        parts = jax.lax.with_sharding_constraint(parts, PartitionSpec(None, BATCH))
        if count == 1:
            return of(jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), parameters)
        return jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, of(part)), None),
            (jnp.zeros(()), zeros),
            parts,
        )[0]

    def _loss(self, parameters, part, total):
        shape = graph(
            self.model,
            self.config.runtime.dtype,
            lookup=spread_lookup,
            rematerialise=self.config.runtime.rematerialise,
        )
        network = bind(shape, parameters)
        if self.model.causal:
            read = {name: part[name][:, :-1] for name in ("tokens", "positions", "segments")}
            targets = part["tokens"][:, 1:]
        else:
            read = {**part, "tokens": part["inputs"]}
            targets = jnp.take_along_axis(part["tokens"], part["places"], axis=1)
        hidden = network.hidden(read["tokens"], read["positions"], read["segments"])
        if not self.model.causal:  # few are asked for, and vocabularies are large
            hidden = states_at(hidden, part["places"])
        states, head = network.output(hidden)
        weights = self._weights(part) / total
        return cross_entropy(states, head, targets, weights, spread=self.spread)

    def _weights(self, part):
        return target_weights(part["segments"]) if self.model.causal else part["chosen"]


def target_weights(segments):
    """bool [..., T]: whether each next token is a target: of the same document, and no padding."""
    return (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)


def norm(tree: Any) -> jax.Array:
    """Of all arrays together; squares of bfloat16 are summed in float32."""
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
