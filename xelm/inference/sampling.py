"""Which token comes next, given how probable each one is."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from clustering.errors import UserError
from clustering.files import read_object

# Of generation_config.json: what is honoured, and what says nothing about the text.
HONOURED = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")
SILENT = (
    *("transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("use_cache", "cache_implementation", "max_length", "output_attentions"),
    *("output_hidden_states", "output_scores", "return_dict_in_generate"),
)


_BLOCK = 256
"""Columns: near the square root of a large vocabulary, so that both steps of a draw are short."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a continuation is drawn, and when it ends."""

    max_new_tokens: int = 40
    """Tokens after which it ends at the latest."""
    temperature: float = 0.8
    """Log probabilities are divided by this; 0 takes the most probable token each time."""
    top_k: int | None = None
    """Draws from so many tokens, the most probable ones; None from all."""
    top_p: float = 0.95
    """Draws from the smallest set of tokens that has this probability."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the text so far are divided by this if positive, multiplied if negative
    (Keskar et al. 2019, arXiv 1909.05858, section 4.1)."""
    stop: tuple[str, ...] = ()
    """Strings before which it ends."""
    random_seed: int = 0
    """Decides the draws."""

    def __post_init__(self) -> None:
        faults = [
            fault
            for wrong, fault in (
                (self.max_new_tokens < 1, f"max_new_tokens at least 1; got {self.max_new_tokens}"),
                (
                    not 0 <= self.temperature < math.inf,
                    f"temperature at least 0; got {self.temperature}",
                ),
                (
                    self.top_k is not None and self.top_k < 1,
                    f"top_k at least 1; got {self.top_k}",
                ),
                (not 0 < self.top_p <= 1, f"top_p above 0 and at most 1; got {self.top_p}"),
                (
                    not 0 < self.repetition_penalty < math.inf,
                    f"repetition_penalty above 0; got {self.repetition_penalty}",
                ),
                ("" in self.stop, "stop strings that are not empty"),
            )
            if wrong
        ]
        if faults:
            raise UserError(f"generating wants {'; '.join(faults)}")


class TokenLikelihood(NamedTuple):
    """How probable a token was where it came."""

    token: int
    """Its id."""
    log_probability: float
    """In nats."""
    top: Sequence[tuple[int, float]]
    """The likeliest ids there with their log probabilities, the likeliest first."""


_ALTERNATIVES = (1, 5, 20)
"""How many of the likeliest tokens are looked for; few, since each is compiled apart."""


def likeliest(
    log_probabilities: Float[Array, "B V"], tokens: Int[np.ndarray, " B"], count: int
) -> list[TokenLikelihood]:
    """Of each row this token and the `count` likeliest ones, at most 20."""
    looked = next((size for size in _ALTERNATIVES if size >= count), _ALTERNATIVES[-1])
    looked = min(looked, log_probabilities.shape[1])
    own, values, ids = _best(log_probabilities, np.asarray(tokens, np.int32), looked)
    own, values, ids = np.asarray(own), np.asarray(values)[:, :count], np.asarray(ids)[:, :count]
    return [
        TokenLikelihood(int(token), float(one), tuple(zip(some.tolist(), best.tolist())))
        for token, one, some, best in zip(tokens, own, ids, values)
    ]


@functools.partial(jax.jit, static_argnums=2)
def _best(log_probabilities, tokens, count):
    own = jnp.take_along_axis(log_probabilities, tokens[:, None], axis=1)[:, 0]
    return own, *jax.lax.top_k(log_probabilities, count)


def sampling_of(directory: str | Path) -> tuple[Sampling, list[str]]:
    """What a checkpoint's generation_config.json asks for, on top of our defaults, and its settings
    that are not honoured."""
    path = Path(directory) / "generation_config.json"
    if not path.is_file():
        return Sampling(), []
    found = {name: value for name, value in read_object(path).items() if value is not None}
    sampling = Sampling()
    # Nothing said about how to draw is no wish to be greedy, in a base model's file.
    wishes = {name: found[name] for name in HONOURED if name in found and name != "do_sample"}
    if found.get("do_sample") is False:
        wishes["temperature"] = 0.0
    elif found.get("do_sample"):
        # As transformers has them where the file says nothing.
        wishes = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, **wishes}
    if wishes.get("top_k") == 0:
        del wishes["top_k"]
    try:
        sampling = replace(sampling, **wishes)
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: {error}") from None
    return sampling, sorted(set(found) - set(HONOURED) - set(SILENT))


@jax.jit
def penalised(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Logits, less for tokens seen before."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(
    log_probabilities: Float[Array, "B V"],
    samplings: Sequence[Sampling],
    steps: Sequence[int],
    numbers: Sequence[int],
) -> Int[Array, " B"]:
    """The next token of each row; log probabilities above 0 count as 0. A row's draws are its own:
    they depend on its random seed, on how many tokens it drew before (`steps`), and on its number
    among those of one request."""
    drawn = [sampling for sampling in samplings if sampling.temperature > 0]
    if not drawn:
        return _largest(log_probabilities)
    vocabulary = log_probabilities.shape[-1]
    return _draw(
        log_probabilities,
        # Both halves of a seed of 64 bits.
        np.asarray([divmod(s.random_seed % 2**64, 2**32) for s in samplings], np.uint32),
        np.asarray(steps, np.int32),
        np.asarray(numbers, np.int32),
        np.asarray([s.temperature for s in samplings], np.float32),
        np.asarray([min(s.top_k or vocabulary, vocabulary) for s in samplings], np.int32),
        np.asarray([s.top_p for s in samplings], np.float32),
        by_number=any(s.top_k is not None for s in drawn),
        by_chance=any(s.top_p < 1 for s in drawn),
    )


@jax.jit
def _largest(values):
    """As argmax, which takes three times as long on CPUs."""
    columns = jnp.arange(values.shape[1])[None]
    top = values == values.max(axis=1, keepdims=True)
    # Of rows that are no numbers, some.
    return jnp.where(top, columns, values.shape[1] - 1).min(axis=1)


@functools.partial(jax.jit, static_argnames=("by_number", "by_chance"))
def _draw(
    log_probabilities,
    seeds,
    steps,
    numbers,
    temperature,
    top_k,
    top_p,
    *,
    by_number,
    by_chance,
):
    def luck(seed, step, number):
        begun = jax.random.fold_in(jax.random.wrap_key_data(seed), step)
        return jax.random.uniform(jax.random.fold_in(begun, number), (2,))

    greedy = temperature == 0
    warmth = jnp.where(greedy, 1.0, temperature)[:, None]
    # Less the largest before it is divided: a quotient of 1e10 is rounded by hundreds.
    highest = log_probabilities.max(axis=1, keepdims=True)
    chances = jax.nn.softmax((log_probabilities - highest) / warmth)
    if by_number or by_chance:
        chances = _kept(
            log_probabilities, chances, top_k if by_number else None, top_p if by_chance else None
        )
    drawn = _drawn(chances, jax.vmap(luck)(seeds, steps, numbers))
    return jnp.where(greedy, _largest(log_probabilities), drawn)


def _drawn(chances, luck):
    """A column of each row by its share of the row: first a block of columns, then one of it. With
    two random numbers a row instead of one for each column, which would take longer than all else;
    and so that each may be as rare as one number can say."""
    rows, count = chances.shape
    blocks = jnp.pad(chances, ((0, 0), (0, -count % _BLOCK))).reshape(rows, -1, _BLOCK)
    block = _first_above(blocks.sum(axis=2), luck[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _first_above(within, luck[:, 1])


def _first_above(shares, luck):
    """Where the sum of the shares so far exceeds this part of all: of the columns that have a
    share, the first, or, if a sum was rounded down, the last."""
    sums, columns = jnp.cumsum(shares, axis=1), jnp.arange(shares.shape[1])[None]
    beyond = (sums > luck[:, None] * sums[:, -1:]) & (shares > 0)
    last = jnp.where(shares > 0, columns, 0).max(axis=1)
    return jnp.minimum(jnp.where(beyond, columns, shares.shape[1]).min(axis=1), last)


def _kept(log_probabilities, chances, top_k, top_p):
    """Chances of the tokens that may be drawn, and none of others: of so many (None: all), and of
    those the likeliest that have `top_p` (None: all) of their chances, as transformers does; equals
    of the last one too."""
    # Of numbers that are not positive, less is more in bits: a threshold is found bit by bit, with
    # a few sums over the vocabulary, where sorting it would take much longer. Those that are given
    # are compared, not what is computed of them, which the compiler may compute twice, and round
    # otherwise: the last one would fall below the threshold that it sets.
    ranks = jax.lax.bitcast_convert_type(jnp.abs(jnp.minimum(log_probabilities, 0.0)), jnp.int32)

    def least(enough):
        """The smallest rank up to which there are enough of a row."""

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
