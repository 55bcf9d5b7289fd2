"""Which ids the texts of a batch contain: a table on the device, to which new ids are added."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

IDS_A_CALL = 1024
"""Number of ids that are added at once, if there are more than rows."""


class SeenIds:
    """Ids that occur in each of some texts."""

    def __init__(self, vocabulary_size: int):
        self._size = vocabulary_size
        self._table: Bool[Array, "R V"] = jnp.zeros((0, vocabulary_size), bool)
        self._known: dict[int, tuple[Any, int]] = {}
        """Row -> the text there, and the number of its ids that the table has."""

    def of(self, rows: int, texts: Mapping[int, tuple[Any, Sequence[int]]]) -> Bool[Array, "R V"]:
        """Whether each id occurs in the text of each row. texts: row -> the text, which is the same
        object as long as its ids only grow, and its ids. Rows without a text mean nothing."""
        if rows != len(self._table):
            self._table, self._known = jnp.zeros((rows, self._size), bool), {}
        other = [row for row, (text, _) in texts.items() if self._known.get(row, (0, 0))[0] != text]
        if other:
            places = np.full(rows, rows, np.int32)  # beyond the last: dropped
            places[: len(other)] = other
            self._table = _cleared(self._table, places)
        pairs: list[tuple[int, int]] = []
        for row, (text, ids) in texts.items():
            known = 0 if row in other else self._known[row][1]
            pairs += [(row, id) for id in ids[known:]]
            self._known[row] = text, len(ids)
        size = rows if len(pairs) <= rows else IDS_A_CALL
        for first in range(0, len(pairs), size):
            part = np.full((size, 2), rows, np.int32)
            some = pairs[first : first + size]
            part[: len(some)] = some
            self._table = _added(self._table, part)
        return self._table


@functools.partial(jax.jit, donate_argnums=0)
def _cleared(table, rows):
    return table.at[rows].set(False, mode="drop")


@functools.partial(jax.jit, donate_argnums=0)
def _added(table, pairs):
    return table.at[pairs[:, 0], pairs[:, 1]].set(True, mode="drop")
