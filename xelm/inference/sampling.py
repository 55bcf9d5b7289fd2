"""Sampling: which token comes next, given the log probability of each."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from clustering.errors import UserError
from clustering.files import read_object
from xelm.inference.sampling_params import SamplingParams

# Settings of generation_config.json that are honoured, and those that do not concern the text.
HONOURED = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")
IRRELEVANT = (
    *("transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("use_cache", "cache_implementation", "max_length", "output_attentions"),
    *("output_hidden_states", "output_scores", "return_dict_in_generate"),
)


_BLOCK = 256
"""Columns of a block: near the square root of a large vocabulary, so both steps are short."""


class TokenLikelihood(NamedTuple):
    """How probable a token was where it stands."""

    token: int
    """Its id."""
    log_probability: float
    """In nats."""
    top: Sequence[tuple[int, float]]
    """The likeliest ids there with their log probabilities, the likeliest first."""


_ALTERNATIVES = (1, 5, 20)
"""Numbers of likeliest tokens that are searched for; few, as a program is compiled for each."""


def likeliest(
    log_probabilities: Float[Array, "B V"], tokens: Int[np.ndarray, " B"], count: int
) -> list[TokenLikelihood]:
    """For each row, how probable this token is and which are the `count` likeliest, at most 20."""
    searched = next((size for size in _ALTERNATIVES if size >= count), _ALTERNATIVES[-1])
    searched = min(searched, log_probabilities.shape[1])
    own, values, ids = _best(log_probabilities, np.asarray(tokens, np.int32), searched)
    own, values, ids = np.asarray(own), np.asarray(values)[:, :count], np.asarray(ids)[:, :count]
    return [
        TokenLikelihood(int(token), float(one), tuple(zip(some.tolist(), best.tolist())))
        for token, one, some, best in zip(tokens, own, ids, values)
    ]


@functools.partial(jax.jit, static_argnums=2)
def _best(log_probabilities, tokens, count):
    own = jnp.take_along_axis(log_probabilities, tokens[:, None], axis=1)[:, 0]
    return own, *jax.lax.top_k(log_probabilities, count)


def read_sampling_params(directory: str | Path) -> tuple[SamplingParams, list[str]]:
    """Sampling parameters of a checkpoint's generation_config.json, on top of our defaults, and the
    names of its settings that are not honoured."""
    path = Path(directory) / "generation_config.json"
    if not path.is_file():
        return SamplingParams(), []
    found = {name: value for name, value in read_object(path).items() if value is not None}
    sampling = SamplingParams()
    # A base model's file that says nothing about drawing does not ask for greedy decoding.
    given = {name: found[name] for name in HONOURED if name in found and name != "do_sample"}
    if found.get("do_sample") is False:
        given["temperature"] = 0.0
    elif found.get("do_sample"):
        # The defaults of transformers.
        given = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, **given}
    if given.get("top_k") == 0:
        del given["top_k"]
    try:
        sampling = replace(sampling, **given)
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: {error}") from None
    return sampling, sorted(set(found) - set(HONOURED) - set(IRRELEVANT))


@jax.jit
def penalised(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Logits, lowered for tokens seen before."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(
    log_probabilities: Float[Array, "B V"],
    samplings: Sequence[SamplingParams],
    steps: Sequence[int],
    numbers: Sequence[int],
) -> Int[Array, " B"]:
    """The next token of each row; log probabilities above 0 count as 0. A row's draw depends on
    nothing but its own random seed, the number of tokens it drew before (`steps`), and its number
    among the sequences of one request."""
    drawn = [sampling for sampling in samplings if sampling.temperature > 0]
    if not drawn:
        return _largest(log_probabilities)
    vocabulary = log_probabilities.shape[-1]
    top_k = [min(s.top_k or vocabulary, vocabulary) for s in samplings]
    top_p = [s.top_p for s in samplings]
    return _draw(
        log_probabilities,
        # Both halves of a seed of 64 bits.
        np.asarray([divmod(s.random_seed % 2**64, 2**32) for s in samplings], np.uint32),
        np.asarray(steps, np.int32),
        np.asarray(numbers, np.int32),
        np.asarray([s.temperature for s in samplings], np.float32),
        None if all(s.top_k is None for s in drawn) else np.asarray(top_k, np.int32),
        None if all(s.top_p == 1 for s in drawn) else np.asarray(top_p, np.float32),
    )


@jax.jit
def _largest(values):
    """argmax over each row, in a third of the time that jnp.argmax takes on CPUs."""
    columns = jnp.arange(values.shape[1])[None]
    top = values == values.max(axis=1, keepdims=True)
    # Rows of nan have some column, too.
    return jnp.where(top, columns, values.shape[1] - 1).min(axis=1)


@jax.jit
def _draw(log_probabilities, seeds, steps, numbers, temperature, top_k, top_p):
    def uniform(seed, step, number):
        step_key = jax.random.fold_in(jax.random.wrap_key_data(seed), step)
        return jax.random.uniform(jax.random.fold_in(step_key, number), (2,))

    greedy = temperature == 0
    divisor = jnp.where(greedy, 1.0, temperature)[:, None]
    # Less the largest before it is divided: a quotient of 1e10 is rounded by hundreds.
    highest = log_probabilities.max(axis=1, keepdims=True)
    chances = jax.nn.softmax((log_probabilities - highest) / divisor)
    if top_k is not None or top_p is not None:
        chances = _kept(log_probabilities, chances, top_k, top_p)
    drawn = _drawn(chances, jax.vmap(uniform)(seeds, steps, numbers))
    return jnp.where(greedy, _largest(log_probabilities), drawn)


def _drawn(chances, uniform):
    """A column of each row, drawn by its share of the row: first a block of columns, then one of
    it. Two random numbers a row suffice, where one for each column would take longer than all
    else; and a column may be as rare as one number can express."""
    rows, count = chances.shape
    blocks = jnp.pad(chances, ((0, 0), (0, -count % _BLOCK))).reshape(rows, -1, _BLOCK)
    block = _first_above(blocks.sum(axis=2), uniform[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _first_above(within, uniform[:, 1])


def _first_above(shares, fractions):
    """The first column with a share at which the sum of the shares so far exceeds this fraction of
    all; if a sum was rounded down, the last one with a share."""
    sums, columns = jnp.cumsum(shares, axis=1), jnp.arange(shares.shape[1])[None]
    beyond = (sums > fractions[:, None] * sums[:, -1:]) & (shares > 0)
    last = jnp.where(shares > 0, columns, 0).max(axis=1)
    return jnp.minimum(jnp.where(beyond, columns, shares.shape[1]).min(axis=1), last)


def _kept(log_probabilities, chances, top_k, top_p):
    """Chances of the tokens that may be drawn, and 0 for others: the `top_k` likeliest (None: all),
    and of those the likeliest that have `top_p` (None: all) of their chances, as in transformers.
    Tokens equal to the last one are kept, too."""
    # The bits of numbers up to 0, read as integers, rise as the numbers fall: a threshold is found
    # bit by bit, with a few sums over the vocabulary, and sorting it would take much longer. The
    # given numbers are compared, not results of them: the compiler may compute these twice and
    # round them otherwise, so that the last one would fall below the threshold that it sets.
    ranks = jax.lax.bitcast_convert_type(jnp.abs(jnp.minimum(log_probabilities, 0.0)), jnp.int32)

    def least(enough):
        """The smallest rank up to which `enough` of each row is kept."""

        def halve(_, bounds):
            low, high = bounds
            middle = low + (high - low) // 2
            found = enough(ranks <= middle[:, None])
            return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

        low = jnp.zeros(len(ranks), jnp.int32)
        infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
        return jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, infinity)))[1]

    if top_k is not None:
        most = least(lambda kept: kept.sum(axis=1) >= top_k)[:, None]
        chances = jnp.where(ranks <= most, chances, 0.0)
    if top_p is not None:
        wanted = top_p * chances.sum(axis=1)
        enough = least(lambda kept: jnp.where(kept, chances, 0.0).sum(axis=1) >= wanted)[:, None]
        # The likeliest in any case: so small a part of all may be nothing.
        enough = jnp.maximum(enough, ranks.min(axis=1, keepdims=True))
        chances = jnp.where(ranks <= enough, chances, 0.0)
    return chances
