"""The state of a training, and what one step makes of it."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from xelm.models.adapters import chosen_targets
from xelm.models.block import most_probable
from xelm.models.config import ModelConfig
from xelm.models.parameters import bind, graph
from xelm.models.target import CPU, Target
from xelm.training.lookups import on_own_rows, spread_lookup, states_at
from xelm.training.loss import Teacher, cross_entropy, distillation, token_losses
from xelm.training.master_weights import Remainders, join_weights, split_weights
from xelm.training.optimizer import clipped, decaying, optimizer
from xelm.training.sharding import BATCH, spread_as_parameters
from xelm.training.spike_guard import accepts, new_guard, updated
from xelm.training.trainable import (
    NOTHING_FIXED,
    Fixed,
    completed,
    divide,
    pulled,
    stacks,
    together,
)
from xelm.training_config import TrainConfig


class SavedState(NamedTuple):
    """All that a step changes, and that a checkpoint has."""

    parameters: Any
    """Nested dictionary of what is trained (`trainable.divide`); float32, or with matrices in
    bfloat16."""
    remainders: Remainders
    """Lower halves of the master weights of matrices in bfloat16."""
    optimizer: Any
    """State of the optax optimiser."""
    step: Any
    """int32, steps done, skipped ones included."""
    guard: Any
    """`SpikeGuard`."""


class TrainState(NamedTuple):
    """What a step gets and returns: the fields of `SavedState`, and what it does not change."""

    parameters: Any
    remainders: Remainders
    optimizer: Any
    step: Any
    guard: Any
    fixed: Fixed = NOTHING_FIXED

    @property
    def saved(self) -> SavedState:
        """The part of a checkpoint."""
        return SavedState(*self[:5])


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
    target: Target = CPU
    """The kind of device that it is compiled for."""

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimiser of the master weights."""
        return optimizer(self.config)

    def begin(self, start: Mapping[str, Any], random_seed: Any = 0) -> TrainState:
        """The state before the first step, from the float32 parameters of a whole model.
        random_seed: that of new adapters."""
        masters, fixed = divide(start, self.config, self.model, random_seed)
        parameters, remainders = split_weights(masters, self.config.runtime.dtype)
        step = jnp.zeros((), jnp.int32)
        moments = self.optimizer.init(masters)
        return TrainState(parameters, remainders, moments, step, new_guard(), fixed)

    def fixed(self, start: Mapping[str, Any]) -> Fixed:
        """What no step changes, from the float32 parameters of a whole model."""
        return divide(start, self.config, self.model)[1]

    def completed(self, trained: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters of a model of which some were trained, the others as in `start`."""
        return completed(trained, start, self.config, self.model)

    def convert(self, state: SavedState) -> SavedState:
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
        loss, gradients = self._gradients(state.parameters, state.fixed.frozen, batch)
        size = norm(gradients)
        made = accepts(state.guard, loss, size)

        @jax.named_scope("optimizer")
        def move(parameters, remainders, moments):
            masters = join_weights(parameters, remainders)
            scaled = clipped(gradients, size, self.config.optimizer.clip_norm)
            decayed = decaying(masters, gradients)
            updates, moments = self.optimizer.update(scaled, moments, decayed)
            updates = jax.tree.map(lambda u: u * rate, updates)
            masters = jax.tree.map(jnp.add, masters, updates)
            masters = pulled(masters, state.fixed.start, self.config, rate)
            return *split_weights(masters, self.config.runtime.dtype), moments

        old = state.parameters, state.remainders, state.optimizer
        parameters, remainders, moments = self._moved_if(made, move, old)
        guard = updated(state.guard, loss, made)
        metrics = StepMetrics(loss, size, guard.skipped, guard.most_in_a_row)
        step = state.step + 1
        return TrainState(parameters, remainders, moments, step, guard, state.fixed), metrics

    def _moved_if(self, made: Any, move: Any, old: tuple[Any, ...]) -> tuple[Any, ...]:
        """What `move` makes of the old state if the step is made, otherwise the old state."""
        if self.target.platform.endswith("gpu"):
            # XLA copies all that a conditional returns there, and the host waits for the condition.
            return jax.tree.map(functools.partial(jnp.where, made), move(*old), old)
        # Elsewhere a choice element by element would hold a second copy of the largest parameter.
        return jax.lax.cond(made, move, lambda *old: old, *old)

    def _gradients(self, parameters, frozen, batch):
        """Loss and gradients, computed in as many parts as configured, and summed in float32."""
        count = self.config.runtime.accumulation_steps
        # Over all parts: those with fewer targets weigh less, as in an undivided batch. A batch may
        # have no target, if it is of first tokens alone.
        total = jnp.maximum(self._weights(batch).sum(), 1).astype(jnp.float32)

        def of(part):
            loss, gradients = jax.value_and_grad(self._loss)(parameters, frozen, part, total)
            return loss, spread_as_parameters(gradients, self.model)

        parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
        parts = jax.lax.with_sharding_constraint(parts, PartitionSpec(None, BATCH))
        if count == 1:
            return of(jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), parameters)

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, of(part)), None

        return jax.lax.scan(add, (jnp.zeros(()), zeros), parts)[0]

    def measure(
        self, state: TrainState, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """For each row of a batch: the sum of -log p over its targets, in nats, and their number;
        float32 [rows]."""
        count = self.config.runtime.accumulation_steps

        def of(part):
            found = self._predictions(state.parameters, state.fixed.frozen, part)[:3]
            losses = token_losses(*found, spread=self.spread)
            weights = self._weights(part).astype(jnp.float32)
            return (losses * weights).sum(axis=1), weights.sum(axis=1)

        parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
        parts = jax.lax.with_sharding_constraint(parts, PartitionSpec(None, BATCH))
        return jax.tree.map(jnp.ravel, jax.lax.map(of, parts))

    def _loss(self, parameters, frozen, part, total):
        states, head, targets, unequal = self._predictions(parameters, frozen, part)
        weights = self._weights(part) / total
        # Adapters and routers leave the head as it is.
        router = self.config.mixture.trained == "router"
        form = {"spread": self.spread, "frozen_head": router or self.config.lora.rank is not None}
        if "teacher_ids" in part:
            share = jnp.broadcast_to(part["teacher_share"][:, None], targets.shape)
            teacher = Teacher(part["teacher_ids"], part["teacher_log_probabilities"], share)
            return distillation(states, head, targets, weights, teacher, **form)
        loss = cross_entropy(states, head, targets, weights, **form)
        parts = self.config.runtime.accumulation_steps
        return loss + self.config.mixture.balance * unequal / parts

    def _predictions(self, parameters, frozen, part):
        """States from which the targets are predicted, the output head, the targets, and how
        unequally the experts of a mixture are used (`balance`; 0 for other models)."""
        dtype, lora = self.config.runtime.dtype, self.config.lora
        shape = graph(
            self.model,
            dtype,
            lookup=spread_lookup,
            spread=on_own_rows,
            rematerialise=self.config.runtime.rematerialise,
            adapted=() if lora.rank is None else chosen_targets(lora.targets, self.model),
            scale=lora.scale,
            stacks=len(stacks(self.config, self.model)),
            target=self.target,
        )
        network = bind(shape, together(parameters, frozen))
        if self.model.causal:
            read = [part[name][:, :-1] for name in ("tokens", "positions", "segments")]
            targets, unequal = part["tokens"][:, 1:], 0.0
            if self.model.expert_count:
                hidden, chances = network.routed(*read)
                unequal = balance(chances, read[2] > 0, self.model.experts_per_token)
            else:
                hidden = network.hidden(*read)
        else:
            hidden = network.hidden(part["inputs"], part["positions"], part["segments"])
            # Few tokens are predicted, and vocabularies are large.
            hidden, unequal = states_at(hidden, part["places"]), 0.0
            targets = jnp.take_along_axis(part["tokens"], part["places"], axis=1)
        return *network.output(hidden), targets, unequal

    def _weights(self, part):
        return target_weights(part["segments"]) if self.model.causal else part["chosen"]


def target_weights(segments):
    """bool [..., T]: whether each next token is a target: of the same document, and no padding."""
    return (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)


def balance(
    probabilities: Float[Array, "L B T E"], valid: Bool[Array, "B T"], per_token: int
) -> Float[Array, ""]:
    """How unequally the experts of a mixture are used: E sum_e f_e P_e, the mean over layers, with
    the share f_e of the valid tokens that pass expert e, and its mean probability P_e there (Fedus
    et al. 2022, arXiv 2101.03961, equation 4). It is `per_token` where all are used equally. Of the
    probabilities, from the routers of L layers, those of `valid` positions count."""
    shares = valid / jnp.maximum(valid.sum(), 1)
    passed = most_probable(probabilities, per_token)
    used, expected = (jnp.einsum("LBTE,BT->LE", each, shares) for each in (passed, probabilities))
    return probabilities.shape[-1] * (used * expected).sum(axis=1).mean()


def norm(tree: Any) -> jax.Array:
    """Euclidean norm of all arrays of a tree together, summed in float32."""
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
