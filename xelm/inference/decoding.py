"""One model that reads texts which grow side by side, with a cache, and says what may follow."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from xelm.models.config import ModelConfig
from xelm.models.parameters import bind_layers, graph
from xelm.models.transformer import Cache, empty_cache
from xelm.training.loss import target_log_probabilities

CHUNK = 512
"""Tokens of a text that are read at once: so many fill the matrix units, and more would need more
memory and more compiled shapes."""
TOGETHER = 4096
"""Tokens of several texts that are read at once."""
LEAST_SLOTS = 64
"""Of a cache."""
LEAST_PIECE = 16
"""Columns of a piece of more than one token: fewer take as long."""


class Reader:
    """Reads texts as they grow. Each has a row for as long as it is here; rows and slots of the
    cache are added in powers of two, so that few shapes are compiled."""

    def __init__(
        self, model: ModelConfig, parameters: Callable[[], Any], compute_dtype: str = "float32"
    ):
        """parameters: asked for at each reading, `for_inference`."""
        self._model, self._parameters, self._dtype = model, parameters, compute_dtype
        self._clear()

    def _clear(self) -> None:
        self.logits: Float[Array, "R V"] = jnp.zeros((0, self._model.vocabulary_size))
        """Scores over the vocabulary after all that was read of each row's text."""
        self.begun = np.zeros(0, np.int32)
        """Tokens that were read of each row's text."""
        self._cache = empty_cache(self._model, 0, LEAST_SLOTS, self._dtype)
        self._free: list[int] = []

    def reserve(self, more: int, slots: int) -> None:
        """Makes room for so many more texts, and for texts of so many tokens, at once instead of
        step by step."""
        had, size = self._cache.keys[0].shape[0], self._cache.keys[0].shape[2]
        rows = max(had, padded(had - len(self._free) + more))
        slots = max(size, min(padded(slots), max(self._model.max_length, slots)))
        if (rows, slots) == (had, size):
            return
        self._cache, self.logits = _larger(self._cache, self.logits, rows=rows, slots=slots)
        self.begun = np.pad(self.begun, (0, rows - had))
        self._free += range(had, rows)

    def enter(self) -> int:
        """A row for a new text."""
        if not self._free:
            self.reserve(1, 0)
        row = min(self._free)
        self._free.remove(row)
        self.begun[row] = 0
        return row

    def leave(self, row: int) -> None:
        """Gives the row of a text to others; the memory too, when it was the last."""
        self._free.append(row)
        if len(self._free) == len(self.begun):
            self._clear()

    def read(
        self, texts: Mapping[int, Int[np.ndarray, " _"]], *, scored: bool = False
    ) -> dict[int, Float[np.ndarray, " _"]]:
        """Reads more tokens of the texts in some rows. If `scored`, returns the log probability of
        each (nan for the very first of a text); otherwise nothing."""
        found: dict[int, list[np.ndarray]] = {row: [np.zeros(0)] for row in texts}
        rest = {row: ids for row, ids in texts.items() if len(ids)}
        self.reserve(0, max((int(self.begun[r]) + len(ids) for r, ids in rest.items()), default=0))
        while rest:
            groups: dict[int, list[int]] = {}
            for row, ids in rest.items():
                groups.setdefault(_columns(len(ids)), []).append(row)
            for size, rows in groups.items():
                most = max(1, TOGETHER // size)
                for first in range(0, len(rows), most):
                    part = {row: rest[row][:size] for row in rows[first : first + most]}
                    for row, scores in zip(part, self._together(part, size, scored)):
                        found[row].append(scores)
            rest = {row: ids[CHUNK:] for row, ids in rest.items() if len(ids) > CHUNK}
        return {row: np.concatenate(scores) for row, scores in found.items()} if scored else {}

    def _together(
        self, texts: Mapping[int, np.ndarray], size: int, scored: bool
    ) -> list[np.ndarray]:
        """Reads at most `size` tokens of each of these texts."""
        capacity = len(self.begun)
        # A token for most of the rows: all are computed, where they lie. Otherwise the rows are
        # taken out and put back.
        everyone = size == 1 and 2 * len(texts) > capacity
        rows = list(range(capacity)) if everyone else list(texts)
        columns = capacity if everyone else padded(len(rows))
        tokens, counts = np.zeros((columns, size), np.int32), np.zeros(columns, np.int32)
        places = np.full(columns, capacity, np.int32)  # beyond the last: dropped
        places[: len(rows)] = rows
        begun = np.pad(self.begun, (0, 1))[places]
        for column, row in enumerate(rows):
            ids = texts.get(row, ())
            tokens[column, : len(ids)] = ids
            counts[column] = len(ids)
        cache, logits = self._cache, self.logits
        if not everyone:
            cache, logits = _taken(cache, logits, places)
        cache = cache._replace(length=begun)
        extend = _extender(self._model, self._dtype)
        found, logits, cache = extend(
            self._parameters(), tokens, counts, cache, logits, scored=scored
        )
        if everyone:
            self._cache, self.logits = cache, logits
        else:
            self._cache, self.logits = _put(self._cache, self.logits, places, cache, logits)
        scores = np.asarray(found, np.float64) if scored else np.zeros((columns, 0))
        scores = [row[:count] for row, count in zip(scores, counts)]
        for column, row in enumerate(rows):
            if scored and counts[column] and not self.begun[row]:
                scores[column][0] = np.nan  # follows nothing
            self.begun[row] += counts[column]
        return [scores[rows.index(row)] for row in texts]


def _columns(length: int) -> int:
    """Tokens that are read at once, of so many."""
    return 1 if length == 1 else min(max(padded(length), LEAST_PIECE), CHUNK)


def padded(length: int) -> int:
    """The power of two that so many things fill up to."""
    return 1 << (length - 1).bit_length() if length else 0


@functools.lru_cache(maxsize=8)
def _extender(model: ModelConfig, compute_dtype: str):
    shape = graph(model, compute_dtype, turned=True)

    @functools.partial(jax.jit, donate_argnums=(3, 4), static_argnames="scored")
    def extend(parameters, tokens, counts, cache, logits, *, scored):
        network, layers = bind_layers(shape, parameters)
        hidden, longer = network.extend(tokens, counts, cache, layers)
        last = jnp.maximum(counts - 1, 0)[:, None, None]
        ends = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
        following = jnp.where(counts[:, None] > 0, network.logits(ends), logits)
        if not scored:
            return None, following, longer
        before = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, :1], axis=-1)
        if tokens.shape[1] > 1:
            states, head = network.output(hidden[:, :-1])
            inner = target_log_probabilities(states, head, tokens[:, 1:])
            before = jnp.concatenate([before, inner], axis=1)
        return before, following, longer

    return extend


@functools.partial(jax.jit, static_argnames=("rows", "slots"))
def _larger(cache: Cache, logits: Array, *, rows: int, slots: int) -> tuple[Cache, Array]:
    def pad(array):
        more = (rows - array.shape[0], slots - array.shape[2])
        return jnp.pad(array, [(0, more[0]), (0, 0), (0, more[1]), (0, 0)])

    keys, values = jax.tree.map(pad, (cache.keys, cache.values))
    length = jnp.pad(cache.length, (0, rows - len(logits)))
    return Cache(keys, values, length), jnp.pad(logits, [(0, rows - len(logits)), (0, 0)])


@jax.jit
def _taken(cache: Cache, logits: Array, rows: Array) -> tuple[Cache, Array]:
    return jax.tree.map(lambda array: array.at[rows].get(mode="clip"), (cache, logits))


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _put(
    cache: Cache, logits: Array, rows: Array, part: Cache, part_logits: Array
) -> tuple[Cache, Array]:
    return jax.tree.map(
        lambda array, new: array.at[rows].set(new, mode="drop"),
        (cache, logits),
        (part, part_logits),
    )
