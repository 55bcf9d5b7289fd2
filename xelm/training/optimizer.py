"""Optimisers and schedules of their rates, from optax."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from xelm.models.parameters import matrices
from xelm.training_config import TrainConfig

_TABLES = {"embedding", "positions", "types"}
"""Parameters of which a step may read a few rows."""


def schedule(config: TrainConfig) -> Float[np.ndarray, " steps"]:
    """Learning rate of each step: linear warm-up, then the configured decay, which reaches the
    final rate at the last step. All are computed before the first step: one by one, each would wait
    on the device for the steps before it."""
    steps, rates = config.steps, config.optimizer
    peak = rates.learning_rate
    final = peak * rates.final_rate_share
    warmup = round(rates.warmup_share * steps)
    rest = max(1, steps - warmup - 1)
    if rates.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, alpha=rates.final_rate_share)
    elif rates.schedule == "linear":
        decay = optax.linear_schedule(peak, final, rest)
    else:
        falling = min(rest, max(1, round(rates.decay_share * steps)))
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


def decaying(parameters: Mapping[str, Any], gradients: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as the weight decay sees them: rows of tables of embeddings that got no gradient
    at a step, since their token did not occur, are zeros there. Otherwise the tokens of languages
    that an expert does not read would shrink at every step."""
    found = dict(parameters)
    for name in _TABLES & parameters.keys():
        # All rows of a table that is also the output head get a gradient.
        if name != "embedding" or "head" in parameters:
            met = (gradients[name] != 0).any(axis=-1, keepdims=True)
            found[name] = jnp.where(met, parameters[name], 0)
    return found


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW or Adafactor, with decay on matrices alone, for a learning rate of 1: the step
    multiplies by the scheduled rate, so that trainings of any length share one program. Updates are
    of the parameters that `decaying` returns.

    Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) for the rates of Adam, as in Zhai et al. 2022
    (arXiv 2106.04560, section 3.4): nothing scales with the parameters, and squares, kept by row
    and by column of each matrix, decay by 1 - t^-.8, but by .999 at most. Updates of each matrix
    are clipped to a root mean square of 1, and averaged by beta1; without beta1, they are not.
    """
    settings = config.optimizer
    if settings.name == "adamw":
        moving = [optax.scale_by_adam(b1=settings.beta1, b2=settings.beta2)]
    else:
        moving = [optax.ema(settings.beta1, debias=False)] if settings.beta1 else []
    moving = [_kept_as(config.runtime.moments_dtype, average) for average in moving]
    if settings.name == "adafactor":
        factored = optax.scale_by_factored_rms(decay_rate_fn=_share_kept)
        moving = [factored, optax.stateless(_clipped_each), *moving]
    # A pull, which takes the place of the decay, is the step's.
    decay_of = settings.weight_decay if settings.pull is None else 0.0
    decay = optax.add_decayed_weights(decay_of, mask=matrices)
    return optax.chain(*moving, decay, optax.scale(-1.0))


def _share_kept(step: Any, exponent: Any) -> Any:
    """Decay of the average of squared updates in a step, 0 at first."""
    return jnp.minimum(1.0 - (step + 1.0) ** -exponent, 0.999)


def _clipped_each(updates: Any, _: Any) -> Any:
    """Scales each matrix or vector of each layer to a root mean square of at most 1."""

    def clip(update, matrix):
        axes = (-2, -1) if matrix else -1
        size = jnp.sqrt(jnp.square(update).mean(axis=axes, keepdims=True))
        return update / jnp.maximum(size, 1.0)

    return jax.tree.map(clip, updates, matrices(updates))


def _kept_as(dtype: str, average: optax.GradientTransformation) -> optax.GradientTransformation:
    """A running average that is computed in float32 and kept in `dtype` between steps."""
    if dtype == "float32":
        return average

    def cast(state, to):
        floats = jnp.floating
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, floats) else x, state)

    def init(params):
        return cast(average.init(params), dtype)

    def update(updates, state, params=None):
        updates, state = average.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
