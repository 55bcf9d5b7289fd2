"""How well calibrated models and their mixtures are: their whole distributions, not only what they
give to the token that came."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from xelm.inference.scoring import states_of_documents
from xelm.models.config import ModelConfig
from xelm.models.parameters import bind_layers, graph

TOKENS_AT_ONCE, VALUES_AT_ONCE = 512, 2**27
"""Of which probabilities are held, and how many of those: 512 MiB."""


class Guesses(NamedTuple):
    """Of N tokens by S systems."""

    confidence: Float[np.ndarray, "S N"]
    """Probability of the likeliest token."""
    correct: Float[np.ndarray, "S N"]
    """1 where that is the token that came, else 0."""
    brier: Float[np.ndarray, "S N"]
    """sum_v (p_v - [v came])^2, between 0 and 2 (Brier 1950)."""


def guess_documents(
    model: ModelConfig,
    models: Sequence[Callable[[], Any]],
    documents: Sequence[Int[np.ndarray, " _"]],
    targets: Sequence[Int[np.ndarray, " _"]],
    mixtures: Float[np.ndarray, "R N M"],
    **options: Any,
) -> Guesses:
    """Of each of M models, then of R mixtures of them.

    models: each gives parameters `for_inference`. targets: of each document, the first ones or all.
    mixtures: weights of the models at each of the N targets. options: of `score_documents`.
    """
    ways, size = len(mixtures), len(models)
    step = max(1, min(TOKENS_AT_ONCE, VALUES_AT_ONCE // model.vocabulary_size // (ways + 2)))
    probabilities = _probabilities(model, options.get("dtype", "float32"))
    states = [
        np.concatenate(
            [
                found[: len(target)]
                for found, target in zip(
                    states_of_documents(model, parameters(), documents, **options), targets
                )
            ]
        )
        for parameters in models
    ]
    wanted = np.concatenate(targets)
    found = np.zeros((3, size + ways, len(wanted)), np.float32)
    for first in range(0, len(wanted), step):
        part = slice(first, min(first + step, len(wanted)))
        padding = [(0, step - (part.stop - first))]
        came = np.pad(wanted[part], padding)
        mixed = _nothing(ways, step, model.vocabulary_size)
        for index, parameters in enumerate(models):
            own = probabilities(parameters(), np.pad(states[index][part], [*padding, (0, 0)]))
            judged = np.asarray(_judged(own, came))
            found[:, index, part] = judged[:, : part.stop - first]
            weights = np.pad(mixtures[:, part, index], [(0, 0), *padding])
            if weights.any():
                mixed = _added(mixed, own, weights)
        for way in range(ways):
            judged = np.asarray(_judged(mixed[way], came))
            found[:, size + way, part] = judged[:, : part.stop - first]
    return Guesses(*found)


@functools.lru_cache(maxsize=8)
def _probabilities(model: ModelConfig, dtype: str):
    shape = graph(model, dtype, turned=True)

    @jax.jit
    def probabilities(parameters, states):
        network, _ = bind_layers(shape, parameters)
        # For the head alone: the states have passed what comes before it.
        _, head = network.output(jnp.zeros((1, model.width), dtype))
        return jax.nn.softmax(head.logits(states.astype(dtype)), axis=-1)

    return probabilities


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _nothing(ways: int, tokens: int, vocabulary: int):
    return jnp.zeros((ways, tokens, vocabulary))


@functools.partial(jax.jit, donate_argnums=0)
def _added(mixed, probabilities, weights):
    return mixed + weights[:, :, None] * probabilities[None]


@jax.jit
def _judged(probabilities, wanted):
    came = jnp.take_along_axis(probabilities, wanted[:, None], axis=-1)[:, 0]
    brier = jnp.square(probabilities).sum(axis=-1) - 2 * came + 1
    correct = (probabilities.argmax(axis=-1) == wanted).astype(jnp.float32)
    return jnp.stack([probabilities.max(axis=-1), correct, brier])
