"""Spike guard: skips steps whose loss or gradient is not finite, and steps whose loss is a spike.

A spike is a loss six standard deviations above the mean of the last 128, as in OLMo's optimiser
that skips steps (github.com/allenai/OLMo-core), and at least three nats above it: batches of few
rows differ by the languages that they happen to contain. Large gradients are clipped instead.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

WINDOW = 128
"""Number of earlier losses that a loss is compared with."""
_ENOUGH = WINDOW // 2
"""Number of known losses below which nothing is a spike."""
_DEVIATIONS = 6.0
"""Standard deviations above the mean from which a loss is a spike."""
_LEAST_SPREAD = 0.5
"""Smallest standard deviation that is assumed, in nats."""


class SpikeGuard(NamedTuple):
    """State of the spike guard: losses of earlier steps, and counts of those that were skipped."""

    losses: Float[Array, " W"]
    """Ring buffer of the last finite losses, with spikes: a loss that stays high is soon none."""
    known: Int[Array, ""]
    """Number of finite losses so far."""
    skipped: Int[Array, ""]
    """Number of skipped steps so far."""
    in_a_row: Int[Array, ""]
    """Number of steps skipped since the last one that was not."""
    most_in_a_row: Int[Array, ""]
    """Largest number of consecutive skipped steps so far."""


def new_guard() -> SpikeGuard:
    """The spike guard of a training that begins."""
    return SpikeGuard(jnp.zeros(WINDOW), *(jnp.zeros((), jnp.int32) for _ in range(4)))


def accepts(guard: SpikeGuard, loss: Float[Array, ""], norm: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a step with this loss and gradient norm is made rather than skipped."""
    count = jnp.minimum(guard.known, WINDOW)
    mean = guard.losses.sum() / jnp.maximum(count, 1)
    apart = jnp.square(guard.losses - mean).sum(where=jnp.arange(WINDOW) < count)
    spread = jnp.sqrt(apart / jnp.maximum(count, 1))
    most = mean + _DEVIATIONS * jnp.maximum(spread, _LEAST_SPREAD)
    spike = (count >= _ENOUGH) & (loss > most)
    return jnp.isfinite(loss) & jnp.isfinite(norm) & ~spike


def updated(guard: SpikeGuard, loss: Float[Array, ""], made: Bool[Array, ""]) -> SpikeGuard:
    """The spike guard after a step with this loss, which was `made` or skipped."""
    number = jnp.isfinite(loss)
    losses = guard.losses.at[guard.known % WINDOW].set(loss)
    in_a_row = jnp.where(made, 0, guard.in_a_row + 1)
    return SpikeGuard(
        losses=jnp.where(number, losses, guard.losses),
        known=guard.known + number,
        skipped=guard.skipped + ~made,
        in_a_row=in_a_row,
        most_in_a_row=jnp.maximum(guard.most_in_a_row, in_a_row),
    )
