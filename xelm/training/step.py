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
from xelm.training.lookups import spread_lookup, states_at
from xelm.training.loss import Teacher, cross_entropy, distillation, token_losses
from xelm.training.master_weights import Remainders, join_weights, split_weights
from xelm.training.optimizer import clipped, optimizer
from xelm.training.sharding import BATCH
from xelm.training.spike_guard import accepts, new_guard, updated


class TrainState(NamedTuple):
    """All that a step changes."""

    parameters: Any
    """Nested dictionary; float32, or with matrices in bfloat16."""
    remainders: Remainders
    """Lower halves of the master weights of matrices in bfloat16."""
    optimizer: Any
    """State of the optax optimiser."""
    step: Any
    """int32, steps done, skipped ones included."""
    guard: Any
    """`SpikeGuard`."""


class StepMetrics(NamedTuple):
    """Metrics of a step."""

    loss: jax.Array
    """Mean over the targets, nats."""
    grad_norm: jax.Array
    """Global norm of the gradients, before clipping."""
    skipped: jax.Array
    """int32, number of steps skipped so far."""
    most_in_a_row: jax.Array
    """int32, largest number of consecutive steps skipped so far."""


@dataclass(frozen=True)
class TrainStep:
    """The training step of one expert, to be compiled by `jax.jit`."""

    model: ModelConfig
    config: TrainConfig
    spread: bool
    """Whether it runs on several devices: those of the mesh that is set."""

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimiser of the master weights."""
        return optimizer(self.config)

    def begin(self, masters: Mapping[str, Any]) -> TrainState:
        """The state before the first step, from float32 parameters."""
        parameters, remainders = split_weights(masters, self.config.runtime.dtype)
        step = jnp.zeros((), jnp.int32)
        return TrainState(parameters, remainders, self.optimizer.init(masters), step, new_guard())

    def convert(self, state: TrainState) -> TrainState:
        """The state of a training in other dtypes, converted to those of this one."""
        masters = join_weights(state.parameters, state.remainders)
        like = jax.eval_shape(self.optimizer.init, masters)
        moments = jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), state.optimizer, like)
        parameters, remainders = split_weights(masters, self.config.runtime.dtype)
        return state._replace(parameters=parameters, remainders=remainders, optimizer=moments)

    def __call__(
        self, state: TrainState, batch: Mapping[str, jax.Array], rate: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        """The state after a step on a batch at a learning rate, and the metrics of the step."""
        loss, gradients = self._gradients(state.parameters, batch)
        size = norm(gradients)
        made = accepts(state.guard, loss, size)

        def move(parameters, remainders, moments):
            masters = join_weights(parameters, remainders)
            scaled = clipped(gradients, size, self.config.optimizer.clip_norm)
            updates, moments = self.optimizer.update(scaled, moments, masters)
            updates = jax.tree.map(lambda u: u * rate, updates)
            masters = jax.tree.map(jnp.add, masters, updates)
            return *split_weights(masters, self.config.runtime.dtype), moments

        # A choice between whole states, element by element, would hold both.
        parameters, remainders, moments = jax.lax.cond(
            made, move, lambda *old: old, state.parameters, state.remainders, state.optimizer
        )
        guard = updated(state.guard, loss, made)
        metrics = StepMetrics(loss, size, guard.skipped, guard.most_in_a_row)
        return TrainState(parameters, remainders, moments, state.step + 1, guard), metrics

    def _gradients(self, parameters, batch):
        """Loss and gradients, computed in as many parts as configured, and summed in float32."""
        count = self.config.runtime.accumulation_steps
        # Over all parts: those with fewer targets weigh less, as in an undivided batch. A batch may
        # have no target, if it is of first tokens alone.
        total = jnp.maximum(self._weights(batch).sum(), 1).astype(jnp.float32)

        def of(part):
            return jax.value_and_grad(self._loss)(parameters, part, total)

        parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
        parts = jax.lax.with_sharding_constraint(parts, PartitionSpec(None, BATCH))
        if count == 1:
            return of(jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), parameters)

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, of(part)), None

        return jax.lax.scan(add, (jnp.zeros(()), zeros), parts)[0]

    def measure(
        self, parameters: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """For each row of a batch: the sum of -log p over its targets, in nats, and their number;
        float32 [rows]."""
        count = self.config.runtime.accumulation_steps

        def of(part):
            losses = token_losses(*self._predictions(parameters, part), spread=self.spread)
            weights = self._weights(part).astype(jnp.float32)
            return (losses * weights).sum(axis=1), weights.sum(axis=1)

        parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
        parts = jax.lax.with_sharding_constraint(parts, PartitionSpec(None, BATCH))
        return jax.tree.map(jnp.ravel, jax.lax.map(of, parts))

    def _loss(self, parameters, part, total):
        states, head, targets = self._predictions(parameters, part)
        weights = self._weights(part) / total
        if "teacher_ids" in part:
            share = jnp.broadcast_to(part["teacher_share"][:, None], targets.shape)
            teacher = Teacher(part["teacher_ids"], part["teacher_log_probabilities"], share)
            return distillation(states, head, targets, weights, teacher, spread=self.spread)
        return cross_entropy(states, head, targets, weights, spread=self.spread)

    def _predictions(self, parameters, part):
        """States from which the targets are predicted, the output head, and the targets."""
        dtype, rematerialise = self.config.runtime.dtype, self.config.runtime.rematerialise
        shape = graph(self.model, dtype, lookup=spread_lookup, rematerialise=rematerialise)
        network = bind(shape, parameters)
        if self.model.causal:
            read = [part[name][:, :-1] for name in ("tokens", "positions", "segments")]
            hidden, targets = network.hidden(*read), part["tokens"][:, 1:]
        else:
            hidden = network.hidden(part["inputs"], part["positions"], part["segments"])
            # Few tokens are predicted, and vocabularies are large.
            hidden = states_at(hidden, part["places"])
            targets = jnp.take_along_axis(part["tokens"], part["places"], axis=1)
        return *network.output(hidden), targets

    def _weights(self, part):
        return target_weights(part["segments"]) if self.model.causal else part["chosen"]


def target_weights(segments):
    """bool [..., T]: whether each next token is a target: of the same document, and no padding."""
    return (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)


def norm(tree: Any) -> jax.Array:
    """Euclidean norm of all arrays of a tree together, summed in float32."""
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
