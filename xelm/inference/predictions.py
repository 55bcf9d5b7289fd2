"""Predictions of models and of their mixtures: what their whole distributions say at each token,
not only the probability of the token that came; and the tokens that a mixture finds likeliest."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from xelm.inference.largest import largest_columns
from xelm.inference.largest import top as likeliest_columns
from xelm.inference.scoring import checked, final_states, score_documents
from xelm.models.config import ModelConfig
from xelm.models.parameters import compiled_by_model
from xelm.models.products import by_rows_of

TOKENS_AT_ONCE, VALUES_AT_ONCE = 512, 2**27
"""Largest numbers of tokens and of probabilities (512 MiB) in memory at once."""
LEAST_TOKENS = 16
"""Smallest number of tokens that are predicted at once."""


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
    probabilities = _probabilities(model, options.get("dtype", "float32"))
    wanted = np.concatenate([np.zeros(0, np.int64), *targets]).astype(np.int32)
    step = _step(len(wanted), model.vocabulary_size * size)
    states = np.zeros((size, len(wanted), model.width), np.float32)
    for index, parameters in enumerate(models):
        found = score_documents(model, parameters(), documents, measure=final_states, **options)
        own = [some[first : first + len(target)] for some, target in zip(found, targets)]
        states[index] = np.concatenate([states[index, :0], *own])
    found = np.zeros((3, size + ways, len(wanted)), np.float32)
    for begin in range(0, len(wanted), step):
        part = slice(begin, min(begin + step, len(wanted)))
        padding = (0, step - (part.stop - begin))
        own = [
            probabilities(parameters(), np.pad(states[index, part], [padding, (0, 0)]))
            for index, parameters in enumerate(models)
        ]
        weights = np.pad(np.exp(mixtures[:, part]), [(0, 0), padding, (0, 0)])
        figures = _statistics(own, weights.astype(np.float32), np.pad(wanted[part], padding))
        found[:, :, part] = np.asarray(figures)[:, :, : part.stop - begin]
    return Predictions(*found)


class Likeliest(NamedTuple):
    """The n most probable tokens at each of T places."""

    ids: Int[np.ndarray, "T n"]
    """The most probable first."""
    log_probabilities: Float[np.ndarray, "T n"]


def likeliest_of_mixture(
    model: ModelConfig,
    models: Sequence[Callable[[], Any]],
    documents: Sequence[Int[np.ndarray, " _"]],
    log_weights: Sequence[Float[np.ndarray, "_ M"]],
    top: int,
    **options: Any,
) -> list[Likeliest]:
    """The `top` most probable tokens under a mixture of M models at the last `scoring.targets` of
    each document: at as many as there are log weights. A model reads a document up to the last
    place where it has weight (a decoder; an encoder all of it). UserError where a model gives no
    probabilities. models, options: as in `predict_documents`."""
    ends = np.cumsum([0, *map(len, log_weights)])
    weights = np.concatenate([np.zeros((0, len(models))), *log_weights]).astype(np.float32)
    states: dict[int, np.ndarray] = {}
    for index, parameters in enumerate(models):
        upto = read_upto(model, documents, [own[:, index] for own in log_weights])
        if not upto:
            continue
        some = [documents[number][:length] for number, length in upto.items()]
        found = score_documents(model, parameters(), some, measure=final_states, **options)
        states[index] = np.zeros((len(weights), model.width), np.float32)
        for number, own in zip(upto, found):
            first = len(documents[number]) + model.causal - len(log_weights[number])
            known = own[first:]
            states[index][ends[number] : ends[number] + len(known)] = known
    step = _step(len(weights), 3 * model.vocabulary_size)
    probabilities = _probabilities(model, options.get("dtype", "float32"))
    parts = [Likeliest(np.zeros((0, top), np.int32), np.zeros((0, top), np.float32))]
    for begin in range(0, len(weights), step):
        part = slice(begin, min(begin + step, len(weights)))
        padding = [(0, step - (part.stop - begin)), (0, 0)]
        mixed = jnp.zeros((1, step, model.vocabulary_size))
        for index, known in states.items():
            if np.isfinite(weights[part, index]).any():
                own = probabilities(models[index](), np.pad(known[part], padding))
                padded = np.pad(weights[part, index][None], [(0, 0), padding[0]])
                mixed = _added(mixed, own, padded)
        found = _likeliest(mixed[0], top)
        parts.append(Likeliest(*(np.asarray(each)[: part.stop - begin] for each in found)))
    joined = [np.concatenate(each) for each in zip(*parts)]
    found = [Likeliest(*(each[a:b] for each in joined)) for a, b in itertools.pairwise(ends)]
    checked("the mixture", [one.log_probabilities for one in found])
    return found


def read_upto(
    model: ModelConfig,
    documents: Sequence[Int[np.ndarray, " _"]],
    log_weights: Sequence[Float[np.ndarray, " _"]],
) -> dict[int, int]:
    """Number of a document -> how many of its ids a model reads that has these log weights at the
    last targets of each document; documents where it has none are missing."""
    found = {}
    for number, own in enumerate(log_weights):
        weighed = np.flatnonzero(np.isfinite(own))
        if len(weighed):
            length = len(documents[number])
            last = length + model.causal - len(own) + int(weighed[-1])  # number of that target
            found[number] = min(last + 1, length) if model.causal else length
    return found


def _step(tokens: int, values: int) -> int:
    """Number of tokens to predict at once, of so many with so many probabilities each: a power of
    two if there are few, as a program is compiled for each number."""
    most = max(1, min(TOKENS_AT_ONCE, VALUES_AT_ONCE // values))
    return min(most, max(LEAST_TOKENS, 1 << max(0, tokens - 1).bit_length()))


@compiled_by_model()
def _probabilities(network, states):
    states = states.astype(network.compute_dtype)
    logits = network.output_head().logits(states, by_rows_of)
    return jnp.exp(jax.nn.log_softmax(logits, axis=-1))


@functools.partial(jax.jit, donate_argnums=0)
def _added(mixed, probabilities, log_weights):
    return mixed + jnp.exp(log_weights)[:, :, None] * probabilities[None]


@functools.partial(jax.jit, static_argnums=1)
def _likeliest(probabilities, top):
    values, ids = likeliest_columns(probabilities, top)
    return ids, jnp.log(values)


@jax.jit
def _statistics(probabilities, weights, wanted):
    """As `Predictions`, of each of M models, [N, V], and of their mixtures by weights [R, N, M]."""

    def at(inputs):
        # Token by token: the probabilities of all systems stay in the caches of a processor.
        own, weights, wanted = inputs
        own = jnp.stack(own)
        mixed = jnp.einsum("RM,MV->RV", weights, own, precision="highest")
        every = jnp.concatenate([own, mixed])
        came = jnp.take(every, wanted, axis=1)
        brier = jnp.square(every).sum(axis=1) - 2 * came + 1
        correct = (largest_columns(every) == wanted).astype(jnp.float32)
        return jnp.stack([every.max(axis=1), correct, brier])

    found = jax.lax.map(at, (probabilities, weights.transpose(1, 0, 2), wanted))
    return found.transpose(1, 2, 0)
