"""Predictions of models and of their mixtures: what their whole distributions say at each token,
not only the probability of the token that came."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from xelm.inference.scoring import states_of_documents
from xelm.models.config import ModelConfig
from xelm.models.parameters import bind, inference_graph

TOKENS_AT_ONCE, VALUES_AT_ONCE = 512, 2**27
"""Largest numbers of tokens and of probabilities (512 MiB) in memory at once."""


class Predictions(NamedTuple):
    """How S systems predict N tokens."""

    log_probability: Float[np.ndarray, "S N"]
    """Log probability of the token that came, in nats."""
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
    places: Sequence[slice] | None = None,
    alone: bool = True,
    **options: Any,
) -> Predictions:
    """Predictions of each of M models, if `alone`, and then of R mixtures of them.

    models: functions that return parameters `for_inference`. targets: N tokens in all, for each
    document some of its `scoring.targets`. places: where those lie among all of the document's;
    None: at the beginning. mixtures: log weights of the models at each token. options: those of
    `score_documents`.
    """
    ways, size = len(mixtures), len(models) if alone else 0
    places = places or [slice(0, len(target)) for target in targets]
    step = max(1, min(TOKENS_AT_ONCE, VALUES_AT_ONCE // model.vocabulary_size // (ways + 2)))
    probabilities = _probabilities(model, options.get("dtype", "float32"))
    ends = np.cumsum([0, *map(len, targets)])
    wanted = np.concatenate(targets) if len(targets) else np.zeros(0, np.int64)
    states = np.zeros((len(models), len(wanted), model.width), np.float32)
    for index, parameters in enumerate(models):
        weighed = np.asarray(np.isfinite(mixtures[:, :, index]).any(axis=0))
        read = [n for n in range(len(targets)) if alone or weighed[ends[n] : ends[n + 1]].any()]
        if not read:
            continue
        some = [documents[number] for number in read]
        for number, found in zip(read, states_of_documents(model, parameters(), some, **options)):
            states[index, ends[number] : ends[number + 1]] = found[places[number]]
    found = np.zeros((4, size + ways, len(wanted)), np.float32)
    for first in range(0, len(wanted), step):
        part = slice(first, min(first + step, len(wanted)))
        padding, real = [(0, step - (part.stop - first))], part.stop - first
        came = np.pad(wanted[part], padding)
        mixed = _empty_mixtures(ways, step, model.vocabulary_size)
        for index, parameters in enumerate(models):
            weights = mixtures[:, part, index]
            if not alone and not np.isfinite(weights).any():
                continue
            own, log_own = probabilities(
                parameters(), np.pad(states[index, part], [*padding, (0, 0)]), came
            )
            if alone:
                found[:, index, part] = np.asarray(_statistics(own, log_own, came))[:, :real]
            weights = np.pad(weights, [(0, 0), *padding], constant_values=-np.inf)
            mixed = _added(mixed, own, log_own, weights.astype(np.float32))
        for way in range(ways):
            own = np.asarray(_statistics(mixed[0][way], mixed[1][way], came))
            found[:, size + way, part] = own[:, :real]
    return Predictions(*found)


@functools.lru_cache(maxsize=8)
def _probabilities(model: ModelConfig, dtype: str):
    shape = inference_graph(model, dtype)

    @jax.jit
    def probabilities(parameters, states, came):
        head = bind(shape, parameters).output_head()
        found = jax.nn.log_softmax(head.logits(states.astype(dtype)), axis=-1)
        return jnp.exp(found), jnp.take_along_axis(found, came[:, None], axis=-1)[:, 0]

    return probabilities


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty_mixtures(ways: int, tokens: int, vocabulary: int):
    return jnp.zeros((ways, tokens, vocabulary)), jnp.full((ways, tokens), -jnp.inf)


@functools.partial(jax.jit, donate_argnums=0)
def _added(mixed, probabilities, log_own, log_weights):
    sums, logs = mixed
    sums = sums + jnp.exp(log_weights)[:, :, None] * probabilities[None]
    return sums, jnp.logaddexp(logs, log_weights + log_own[None])


@jax.jit
def _statistics(probabilities, log_own, wanted):
    came = jnp.take_along_axis(probabilities, wanted[:, None], axis=-1)[:, 0]
    brier = jnp.square(probabilities).sum(axis=-1) - 2 * came + 1
    correct = (probabilities.argmax(axis=-1) == wanted).astype(jnp.float32)
    return jnp.stack([log_own, probabilities.max(axis=-1), correct, brier])
