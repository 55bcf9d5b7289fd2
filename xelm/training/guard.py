"""Which steps would do harm, so that they are left out: losses that are no number, and spikes.

A spike is a loss six standard deviations above the mean of the last 128, as in OLMo's optimiser
that skips steps (github.com/allenai/OLMo-core), and by three nats at the least: batches of few rows
differ by the languages that they happen to hold. Large gradients are clipped instead.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

WINDOW = 128
"""Losses that a loss is held against."""
_ENOUGH = WINDOW // 2
"""Below so many losses nothing is a spike."""
_DEVIATIONS = 6.0
_LEAST_SPREAD = 0.5
"""Nats."""


class Guard(NamedTuple):
    """What is known of the steps before."""

    losses: Float[Array, " W"]
    """The last ones, in no order: of spikes as well, so that what lasts is none for long."""
    known: Int[Array, ""]
    """Losses that were numbers."""
    skipped: Int[Array, ""]
    in_a_row: Int[Array, ""]
    """Skipped since the last step that was made."""
    most_in_a_row: Int[Array, ""]


def fresh() -> Guard:
    """Of a training that begins."""
    zero = jnp.zeros((), jnp.int32)
    return Guard(jnp.zeros(WINDOW), known=zero, skipped=zero, in_a_row=zero, most_in_a_row=zero)


def harmless(guard: Guard, loss: Float[Array, ""], norm: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a step of this loss and gradient norm is to be made."""
    count = jnp.minimum(guard.known, WINDOW)
    mean = guard.losses.sum() / jnp.maximum(count, 1)
    apart = jnp.square(guard.losses - mean).sum(where=jnp.arange(WINDOW) < count)
    spread = jnp.sqrt(apart / jnp.maximum(count, 1))
    most = mean + _DEVIATIONS * jnp.maximum(spread, _LEAST_SPREAD)
    spike = (count >= _ENOUGH) & (loss > most)
    return jnp.isfinite(loss) & jnp.isfinite(norm) & ~spike


def after(guard: Guard, loss: Float[Array, ""], made: Bool[Array, ""]) -> Guard:
    """The same, one step later."""
    number = jnp.isfinite(loss)
    losses = guard.losses.at[guard.known % WINDOW].set(loss)
    in_a_row = jnp.where(made, 0, guard.in_a_row + 1)
    return Guard(
        losses=jnp.where(number, losses, guard.losses),
        known=guard.known + number,
        skipped=guard.skipped + ~made,
        in_a_row=in_a_row,
        most_in_a_row=jnp.maximum(guard.most_in_a_row, in_a_row),
    )
