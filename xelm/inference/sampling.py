"""Sampling: which token comes next, given the log probability of each."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from clustering.errors import UserError
from clustering.files import read_object
from xelm.inference.largest import in_blocks, largest_columns, top, windows
from xelm.inference.sampling_params import SamplingParams

# Settings of generation_config.json that are honoured, and those that do not concern the text.
HONOURED = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")
IRRELEVANT = (
    *("transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("use_cache", "cache_implementation", "max_length", "output_attentions"),
    *("output_hidden_states", "output_scores", "return_dict_in_generate"),
)


_CANDIDATES = (64, 256, 1024, 4096, 16384)
"""Numbers of likeliest tokens that are sorted; few, as a program is compiled for each."""


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
    return own, *top(log_probabilities, count)


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
    """The next token of each row; -1 where the largest log probability is not finite. A row's draw
    depends on nothing but its own log probabilities and random seed, the number of tokens it drew
    before (`steps`), and its number among the sequences of one request."""
    if all(sampling.temperature == 0 for sampling in samplings):
        return _largest(log_probabilities)[0]
    vocabulary = log_probabilities.shape[-1]
    greedy = SamplingParams(temperature=0.0, top_p=1.0)
    kept = [sampling if sampling.temperature else greedy for sampling in samplings]
    top_k = [min(s.top_k or vocabulary, vocabulary) for s in kept]
    top_p = [s.top_p for s in kept]
    sizes = [_candidates(k, p, vocabulary) for k, p in zip(top_k, top_p)]
    return _draw(
        log_probabilities,
        # Both halves of a seed of 64 bits.
        np.asarray([divmod(s.random_seed % 2**64, 2**32) for s in samplings], np.uint32),
        np.asarray(steps, np.int32),
        np.asarray(numbers, np.int32),
        np.asarray([s.temperature for s in samplings], np.float32),
        None if min(top_k) == vocabulary else np.asarray(top_k, np.int32),
        None if min(top_p) == 1 else np.asarray(top_p, np.float32),
        np.asarray(sizes, np.int32),
        candidates=max(sizes),
    )


def _candidates(top_k: int, top_p: float, vocabulary: int) -> int:
    """Number of likeliest tokens among which those that are kept are looked for: more than `top_k`;
    0 where all are kept. It follows from a row's own parameters, since a token that is drawn from
    them is another one than would be drawn from all."""
    if top_k == vocabulary and top_p == 1:
        return 0
    most = top_k if top_k < vocabulary else 0
    return min(next((size for size in _CANDIDATES if size > most), vocabulary), vocabulary)


@functools.partial(jax.jit, static_argnames="candidates")
def _draw(log_probabilities, seeds, steps, numbers, temperature, top_k, top_p, own, *, candidates):
    """As `sample`. top_k, top_p: of each row; None where no row has one. own: `_candidates` of each
    row. candidates: the largest of these."""

    def key(seed, step, number):
        step_key = jax.random.fold_in(jax.random.wrap_key_data(seed), step)
        return jax.random.fold_in(step_key, number)

    keys = jax.vmap(key)(seeds, steps, numbers)
    greedy = temperature == 0
    likeliest, highest = _largest(log_probabilities)
    shares = _Shares(highest, jnp.where(greedy, 1.0, temperature))
    greedy = greedy | (likeliest < 0)
    if top_k is None and top_p is None:
        sums = shares.of(in_blocks(log_probabilities, -jnp.inf)).sum(axis=2)
        drawn, _ = _drawn(log_probabilities, shares, sums, _uniform(keys, 0))
    else:
        sizes = own, candidates
        drawn = _drawn_of_kept(log_probabilities, shares, keys, greedy, top_k, top_p, sizes)
    return jnp.where(greedy, likeliest, drawn)


@jax.jit
def _largest(log_probabilities):
    """The column of the largest value of each row, -1 where that is not finite, and the value."""
    columns = largest_columns(log_probabilities)
    highest = jnp.take_along_axis(log_probabilities, columns[:, None], axis=1)[:, 0]
    return jnp.where(jnp.isfinite(highest), columns, -1), highest


def _uniform(keys, attempt):
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, attempt), (2,)))(keys)


class _Shares(NamedTuple):
    """Chances of tokens as parts of that of the likeliest, at a temperature."""

    highest: Any
    """The largest log probability of each row, [B]."""
    temperature: Any
    """[B]"""
    least: Any = None
    """Log probability below which a token has no chance, [B]; None: all have one."""

    def of(self, values):
        """Shares of tokens with these log probabilities, [B, ...]."""

        def spread(numbers):
            return numbers.reshape(len(numbers), *[1] * (values.ndim - 1))

        # Less the largest before it is divided: a quotient of 1e10 is rounded by hundreds.
        found = jnp.exp((values - spread(self.highest)) / spread(self.temperature))
        return found if self.least is None else jnp.where(values >= spread(self.least), found, 0.0)


def _drawn(values, shares, sums, uniform):
    """A column of each row and its value, drawn by its share: first a block of columns, by the sums
    of shares there, then one of it. Two random numbers a row suffice, where one for each column
    would take longer than all else; and a column may be as rare as one number can express."""
    block = _first_above(sums, uniform[:, 0])
    window, columns = windows(values, block[:, None])
    place = _first_above(shares.of(window[:, 0]), uniform[:, 1])
    here = jnp.arange(window.shape[2])[None] == place[:, None]
    # As maxima, which are computed once: lookups would be repeated wherever they are used.
    return (
        jnp.where(here, columns[:, 0], 0).max(axis=1),
        jnp.where(here, window[:, 0], -jnp.inf).max(axis=1),
    )


def _first_above(shares, fractions):
    """The first column with a share at which the sum of the shares so far exceeds this fraction of
    all; if a sum was rounded down, the last one with a share."""
    sums, columns = jnp.cumsum(shares, axis=1), jnp.arange(shares.shape[1])[None]
    beyond = (sums > fractions[:, None] * sums[:, -1:]) & (shares > 0)
    last = jnp.where(shares > 0, columns, 0).max(axis=1)
    return jnp.minimum(jnp.where(beyond, columns, shares.shape[1]).min(axis=1), last)


def _drawn_of_kept(values, shares, keys, ready, top_k, top_p, sizes):
    """A column of each row drawn from the `top_k` likeliest (None: all), and of those the likeliest
    that have `top_p` (None: all) of their chances, as in transformers. Tokens equal to the last one
    are kept, too. ready: rows whose draw is not used. sizes: `_candidates` of each row, and the
    largest of these."""
    own, candidates = sizes
    largest, columns = top(values, candidates)
    if top_k is not None:
        last = jnp.minimum(top_k, candidates)[:, None] - 1
        least = jnp.take_along_axis(largest, last, axis=1)[:, 0]
        shares = shares._replace(least=jnp.where(top_k < values.shape[1], least, -jnp.inf))
    sums = shares.of(in_blocks(values, -jnp.inf)).sum(axis=2)
    wanted = jnp.full(len(values), jnp.inf)
    if top_p is not None:
        # The likeliest is kept in any case: so small a part of all may be nothing.
        part = jnp.maximum(top_p * sums.sum(axis=1), jnp.finfo(jnp.float32).tiny)
        wanted = jnp.where(top_p < 1, part, wanted)

    # Where all that are kept are among a row's candidates, one of these is drawn.
    chances = shares.of(largest)
    before = jnp.cumsum(chances, axis=1) - chances
    kept = (chances > 0) & (before < wanted[:, None])
    kept &= jnp.arange(candidates)[None] < own[:, None]
    least = jnp.where(kept, largest, jnp.inf).min(axis=1, keepdims=True)
    place = _first_above(jnp.where(largest >= least, chances, 0.0), _uniform(keys, 0)[:, 0])
    drawn = jnp.take_along_axis(columns, place[:, None], axis=1)[:, 0]
    # With a slice of the sorted values XLA would sort everything.
    smallest = jnp.take_along_axis(largest, jnp.maximum(own, 1)[:, None] - 1, axis=1)
    complete = (own > 0) & ((smallest < least)[:, 0] | (own == values.shape[1]))

    # Otherwise tokens are drawn from all until one comes that is kept: those that are likelier have
    # less than `top_p`. That takes 1 / top_p attempts, where to find the last one that is kept
    # would take many sums over the vocabulary.
    def attempt(state):
        number, drawn, ready = state
        found, value = _drawn(values, shares, sums, _uniform(keys, number))
        likelier = jnp.where(values > value[:, None], values, -jnp.inf)
        before = shares._replace(least=None).of(likelier).sum(axis=1)
        return number + 1, jnp.where(ready, drawn, found), ready | (before < wanted)

    start = (jnp.int32(0), drawn, ready | complete)
    return jax.lax.while_loop(lambda state: ~state[2].all(), attempt, start)[1]
