"""AdamW and its learning-rate schedules, from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from xelm.config import TrainConfig


def schedule(config: TrainConfig) -> Float[np.ndarray, " steps"]:
    """Learning rate of each step: linear warm-up, then the configured decay, which reaches the
    final rate at the last step. All at once, before the first step: asked for one by one they would
    wait on the device for the steps before them."""
    steps, peak = config.steps, config.learning_rate
    final = peak * config.final_rate_share
    warmup = round(config.warmup_share * steps)
    rest = max(1, steps - warmup - 1)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, alpha=config.final_rate_share)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, final, rest)
    else:
        falling = min(rest, max(1, round(config.decay_share * steps)))
        decay = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, falling)],
            [rest - falling],
        )
    if warmup:
        # The first step already moves: by peak / warmup, not by zero.
        rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
        decay = optax.join_schedules([rise, decay], [warmup])
    return np.asarray(jax.jit(decay)(np.arange(steps)), np.float64)


def clipped(gradients: Any, norm: Float[Array, ""], clip_norm: float) -> Any:
    """Gradients of this global norm, scaled down to one of at most `clip_norm`."""
    # A factor of its own, by which XLA multiplies on the way to the averages: optax chooses between
    # gradients and clipped ones, and a second copy of all of them is kept.
    factor = clip_norm / jnp.maximum(norm, clip_norm)
    return jax.tree.map(lambda gradient: gradient * factor, gradients)


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with decay on matrices alone, for a learning rate of 1: the step multiplies by the
    scheduled rate, so that trainings of any length share one program."""
    return optax.adamw(
        1.0,
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=_is_matrix,
    )


def _is_matrix(parameters):
    # Stacked over layers, a norm's scale has two dimensions: tell by the name, not by the rank.
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.endswith(("scale", "bias")), parameters
    )
