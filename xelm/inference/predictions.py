"""Predictions of models and of their mixtures: what their whole distributions say at each token,
not only the probability of the token that came."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from xelm.inference.scoring import final_states, score_documents
from xelm.models.config import ModelConfig
from xelm.models.parameters import compiled_by_model

TOKENS_AT_ONCE, VALUES_AT_ONCE = 512, 2**27
"""Largest numbers of tokens and of probabilities (512 MiB) in memory at once."""


class Predictions(NamedTuple):
    """How S systems predict N tokens."""

    confidence: Float[np.ndarray, "S N"]
    """Probability of the likeliest token."""
    correct: Float[np.ndarray, "S N"]
    """1 where that is the token that came, else 0."""
    brier: Float[np.ndarray, "S N"]
    """sum_v (p_v - [v came])^2, between 0 and 2 (Brier 1950)."""


def predict_documents(
    model: ModelConfig,
    models: Sequence[Callable[[], Any]],
    documents: Sequence[Int[np.ndarray, " _"]],
    targets: Sequence[Int[np.ndarray, " _"]],
    mixtures: Float[np.ndarray, "R N M"],
    *,
    first: int = 0,
    **options: Any,
) -> Predictions:
    """Predictions of each of M models, and then of R mixtures of them.

    models: functions that return parameters `for_inference`. targets: N tokens in all, of each
    document some of its `scoring.targets`, from number `first` on. mixtures: log weights of the
    models at each token. options: those of `score_documents`."""
    ways, size = len(mixtures), len(models)
    step = max(1, min(TOKENS_AT_ONCE, VALUES_AT_ONCE // model.vocabulary_size // (ways + 2)))
    probabilities = _probabilities(model, options.get("dtype", "float32"))
    wanted = np.concatenate([np.zeros(0, np.int64), *targets])
    states = np.zeros((size, len(wanted), model.width), np.float32)
    for index, parameters in enumerate(models):
        found = score_documents(model, parameters(), documents, measure=final_states, **options)
        own = [some[first : first + len(target)] for some, target in zip(found, targets)]
        states[index] = np.concatenate([states[index, :0], *own])
    found = np.zeros((3, size + ways, len(wanted)), np.float32)
    for begin in range(0, len(wanted), step):
        part = slice(begin, min(begin + step, len(wanted)))
        real = part.stop - begin
        padding = [(0, step - real)]
        came = np.pad(wanted[part], padding)
        mixed = jnp.zeros((ways, step, model.vocabulary_size))
        for index, parameters in enumerate(models):
            padded = np.pad(states[index, part], [*padding, (0, 0)])
            own = probabilities(parameters(), padded)
            found[:, index, part] = np.asarray(_statistics(own, came))[:, :real]
            weights = np.pad(
                mixtures[:, part, index], [(0, 0), *padding], constant_values=-np.inf
            ).astype(np.float32)
            mixed = _added(mixed, own, weights)
        for way in range(ways):
            found[:, size + way, part] = np.asarray(_statistics(mixed[way], came))[:, :real]
    return Predictions(*found)


@compiled_by_model()
def _probabilities(network, states):
    logits = network.output_head().logits(states.astype(network.compute_dtype))
    return jnp.exp(jax.nn.log_softmax(logits, axis=-1))


@functools.partial(jax.jit, donate_argnums=0)
def _added(mixed, probabilities, log_weights):
    return mixed + jnp.exp(log_weights)[:, :, None] * probabilities[None]


@jax.jit
def _statistics(probabilities, wanted):
    came = jnp.take_along_axis(probabilities, wanted[:, None], axis=-1)[:, 0]
    brier = jnp.square(probabilities).sum(axis=-1) - 2 * came + 1
    correct = (probabilities.argmax(axis=-1) == wanted).astype(jnp.float32)
    return jnp.stack([probabilities.max(axis=-1), correct, brier])
