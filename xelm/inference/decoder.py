"""One model that reads growing sequences, with a cache of keys and values."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from xelm.models.cache import Cache, empty_cache
from xelm.models.config import ModelConfig
from xelm.models.head import target_log_probabilities
from xelm.models.parameters import compiled_by_model

PIECES = (16, 64, 256)
"""Numbers of tokens of a sequence that are read in one call, beside one. Fewer than the first take
as long, and the last fills the matrix units."""
ROWS = (1, 4, 16, 64)
"""Numbers of sequences that are read in one call; few, as a program is compiled for each shape."""
TOKENS_A_CALL = 4096
"""Largest number of tokens that are read in one call."""
LEAST_SLOTS = 64
"""Smallest number of tokens of a row of the cache."""


class Decoder:
    """Reads sequences as they grow; each has a row of the cache from `allocate` until `free`."""

    def __init__(
        self, model: ModelConfig, parameters: Callable[[], Any], compute_dtype: str = "float32"
    ):
        """parameters: called at each reading; returns parameters `for_inference`."""
        self._model, self._parameters, self._dtype = model, parameters, compute_dtype
        self._clear()

    def _clear(self) -> None:
        self.logits: Float[Array, "R V"] = jnp.zeros((0, self._model.vocabulary_size))
        """Logits of the token after all that was read of each row."""
        self.lengths = np.zeros(0, np.int32)
        """Number of tokens that were read of each row."""
        self._cache = empty_cache(self._model, 0, LEAST_SLOTS, self._dtype)
        self._free: list[int] = []

    def reserve(self, more: int, slots: int) -> None:
        """Allocates memory, at once, for so many more sequences and for rows of `slots` tokens."""
        had, size = self._cache.keys[0].shape[0], self._cache.keys[0].shape[2]
        rows = max(had, capacity(had - len(self._free) + more))
        slots = max(size, min(padded(slots), max(self._model.max_length, slots)))
        if (rows, slots) == (had, size):
            return
        self._cache, self.logits = _larger(self._cache, self.logits, rows=rows, slots=slots)
        self.lengths = np.pad(self.lengths, (0, rows - had))
        self._free += range(had, rows)

    def allocate(self) -> int:
        """A free row, for a new sequence."""
        if not self._free:
            self.reserve(1, 0)
        row = min(self._free)
        self._free.remove(row)
        self.lengths[row] = 0
        return row

    def free(self, row: int) -> None:
        """Frees a row, and all memory when it was the last."""
        self._free.append(row)
        if len(self._free) == len(self.lengths):
            self._clear()

    def read(
        self, unread: Mapping[int, Int[np.ndarray, " _"]], *, scored: bool = False
    ) -> dict[int, Float[np.ndarray, " _"]]:
        """Reads the next tokens of some rows, given by row. If `scored`, returns the log
        probability of each (nan for the very first of a sequence); otherwise nothing."""
        found: dict[int, list[np.ndarray]] = {row: [np.zeros(0)] for row in unread}
        rest = {row: ids for row, ids in unread.items() if len(ids)}
        self.reserve(
            0, max((int(self.lengths[r]) + len(ids) for r, ids in rest.items()), default=0)
        )
        while rest:
            pieces: dict[int, list[int]] = {}
            for row, ids in rest.items():
                size = 1 if len(ids) == 1 else _next_of(len(ids), PIECES)
                pieces.setdefault(size, []).append(row)
            for size, rows in pieces.items():
                for some in self._calls(rows, size):
                    part = {row: rest[row][:size] for row in some}
                    for row, scores in zip(some, self._read_once(part, size, scored)):
                        found[row].append(scores)
                for row in rows:
                    rest[row] = rest[row][size:]
            rest = {row: ids for row, ids in rest.items() if len(ids)}
        return {row: np.concatenate(scores) for row, scores in found.items()} if scored else {}

    def _calls(self, rows: list[int], size: int) -> list[list[int]]:
        """Rows of which `size` tokens are read, split by calls."""
        if size == 1:
            return [rows]  # takes as long as the parameters take to be read
        parts, first = [], 0
        sizes = [count for count in ROWS if count * size <= TOKENS_A_CALL]
        while first < len(rows):
            count = _next_of(len(rows) - first, sizes)
            parts.append(rows[first : first + count])
            first += count
        return parts

    def _read_once(
        self, unread: Mapping[int, np.ndarray], size: int, scored: bool
    ) -> list[np.ndarray]:
        had = len(self.lengths)
        # Where many rows have a token, all are computed, where they lie.
        all_rows = size == 1 and 4 * len(unread) >= had
        rows = list(range(had)) if all_rows else list(unread)
        columns = had if all_rows else capacity(len(rows))
        tokens, counts = np.zeros((columns, size), np.int32), np.zeros(columns, np.int32)
        places = np.full(columns, had, np.int32)  # beyond the last: dropped
        places[: len(rows)] = rows
        for column, row in enumerate(rows):
            ids = unread.get(row, ())
            tokens[column, : len(ids)] = ids
            counts[column] = len(ids)
        extend = _extender(self._model, self._dtype)
        found, self.logits, self._cache = extend(
            self._parameters(),
            tokens,
            counts,
            # A copy: the device may read this very array, later.
            self._cache._replace(length=self.lengths.copy()),
            self.logits,
            None if all_rows else places,
            scored=scored,
        )
        scores = np.asarray(found, np.float64) if scored else np.zeros((columns, 0))
        scores = [row[:count] for row, count in zip(scores, counts)]
        for column, row in enumerate(rows):
            if scored and counts[column] and not self.lengths[row]:
                scores[column][0] = np.nan  # follows nothing
        self.lengths[rows] += counts[: len(rows)]
        return [scores[rows.index(row)] for row in unread]


def capacity(count: int) -> int:
    """Number of rows of a cache for so many sequences: a power of two, but not two."""
    return padded(count) if count < 2 else max(4, padded(count))


def padded(length: int) -> int:
    """The smallest power of two that is not less; 0 for 0."""
    return 1 << (length - 1).bit_length() if length else 0


def _next_of(count: int, sizes: Sequence[int]) -> int:
    """The size that is used next for so many things: the smallest that takes them all, if they fill
    three quarters of it or there is no smaller one; otherwise the next smaller one."""
    size = next((size for size in sizes if size >= count), sizes[-1])
    below = [smaller for smaller in sizes if smaller < size]
    return below[-1] if below and 4 * count < 3 * size else size


@compiled_by_model(donate_argnums=(3, 4), static_argnames="scored")
def _extender(network, tokens, counts, cache, logits, rows, *, scored):
    hidden, longer = network.extend(tokens, counts, cache, rows)
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    ends = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    before = logits if rows is None else logits.at[rows].get(mode="clip")
    following = jnp.where(counts[:, None] > 0, network.logits(ends), before)
    if rows is not None:
        following = logits.at[rows].set(following, mode="drop")
    if not scored:
        return None, following, longer
    found = jnp.take_along_axis(jax.nn.log_softmax(before), tokens[:, :1], axis=-1)
    if tokens.shape[1] > 1:
        states, head = network.output(hidden[:, :-1])
        inner = target_log_probabilities(states, head, tokens[:, 1:])
        found = jnp.concatenate([found, inner], axis=1)
    return found, following, longer


@functools.partial(jax.jit, static_argnames=("rows", "slots"))
def _larger(cache: Cache, logits: Array, *, rows: int, slots: int) -> tuple[Cache, Array]:
    def pad(array):
        more = (rows - array.shape[0], slots - array.shape[2])
        return jnp.pad(array, [(0, more[0]), (0, 0), (0, more[1]), (0, 0)])

    keys, values = jax.tree.map(pad, (cache.keys, cache.values))
    length = jnp.pad(cache.length, (0, rows - len(logits)))
    return Cache(keys, values, length), jnp.pad(logits, [(0, rows - len(logits)), (0, 0)])
