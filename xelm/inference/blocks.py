"""Blocks: caches of one or several texts that have equally many slots and are computed together.

A text that is being read has a block of its own, so that a long one costs no other text anything.
Texts that grow token by token share blocks, and how they are divided among blocks follows from the
bytes that a step reads: a further block means that the parameters are read once more, a larger one
that empty slots are. Pages of a fixed size waste fewer slots, but on CPUs XLA takes several times
as long to gather them as for attention itself (docs/architecture.md)."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from xelm.models.cache import Cache, empty_cache, slots_by_layer
from xelm.models.config import ModelConfig

LEAST_SLOTS = 64
"""Smallest number of slots of a block."""
WORTH_MOVING = 1.25
"""Texts are moved to other blocks when a step reads this many times the bytes that it need."""

Key = TypeVar("Key", bound=Hashable)
Arrays = tuple[tuple[Array, ...], tuple[Array, ...], Float[Array, "R V"]]
"""Keys and values of each layer, and the logits of the token after each row."""


@dataclass(eq=False, slots=True)
class Text:
    """What a model has read of one text, and where that lies."""

    target: Sequence[int]
    """Ids of the whole text, which may grow."""
    block: "Block"
    index: int = 0
    """Row of the block."""
    ids: list[int] = field(default_factory=list)
    """Ids that were read."""
    stored: int = 0
    """Number of slots that were written, if the cache is no ring: those of ids, and
    those of what fills up the calls that read them."""
    scores: list[float] | None = field(default_factory=list)
    """Log probability of each id that was read (nan for the first); None if they are not known."""
    reserved: int = 0
    """Number of slots to have at least, for ids that are expected."""
    open: bool = True
    """Whether it may still be read."""

    @property
    def slots_needed(self) -> int:
        """Slots that its block must have for one more id."""
        return slots_for(max(len(self.ids) + 1, self.reserved))


@dataclass(eq=False, slots=True)
class Block:
    """R rows of a cache with S slots each, some of them taken by texts."""

    cache: Cache
    """Keys and values; the lengths in it mean nothing."""
    logits: Float[Array, "R V"]
    texts: list[Text | None]
    """The text in each row."""
    model: ModelConfig
    """Shape of the model that reads them."""
    slots: int
    """Number of slots of each row, and so of tokens that it may have; local layers have fewer where
    their caches are rings (`ring_slots`)."""

    @property
    def bytes(self) -> int:
        """Size of its arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.arrays))

    @property
    def arrays(self) -> Arrays:
        """All that is kept of the texts."""
        return self.cache.keys, self.cache.values, self.logits

    @arrays.setter
    def arrays(self, arrays: Arrays) -> None:
        keys, values, self.logits = arrays
        self.cache = Cache(keys, values, self.cache.length)

    @property
    def lengths(self) -> np.ndarray:
        """Number of ids that were read of each row, 0 for rows without a text."""
        return np.asarray([len(text.ids) if text else 0 for text in self.texts], np.int32)

    @property
    def count(self) -> int:
        """Number of texts."""
        return sum(text is not None for text in self.texts)


def empty_block(model: ModelConfig, rows: int, slots: int, dtype: str) -> Block:
    """A block without texts."""
    logits = jnp.zeros((rows, model.vocabulary_size))
    return Block(empty_cache(model, rows, slots, dtype), logits, [None] * rows, model, slots)


def copied(text: Text, slots: int) -> Block:
    """A block of one row with so many slots and what is kept of a text."""
    keys, values, logits = row_of(text, slots)
    cache = Cache(keys, values, jnp.zeros(1, jnp.int32))
    return Block(cache, logits, [None], text.block.model, slots)


def block_bytes(model: ModelConfig, rows: int, slots: int, dtype: str) -> int:
    """Size of the arrays of a block."""
    return rows * (row_bytes(model, slots, dtype) + 4 * model.vocabulary_size)


def row_bytes(model: ModelConfig, slots: int, dtype: str) -> int:
    """Size of the keys and values of a row with so many slots."""
    size = model.key_head_count * model.head_size * jnp.dtype(dtype).itemsize
    return 2 * size * sum(slots_by_layer(model, slots))


def row_of(text: Text, slots: int) -> Arrays:
    """A copy of what is kept of one text, as of a block of one row with so many slots."""
    by_layer = slots_by_layer(text.block.model, slots)
    return _taken(text.block.arrays, np.int32(text.index), by_layer)


def move(text: Text, block: Block, index: int) -> None:
    """Moves a text to a free row of another block, which has slots for it."""
    block.arrays = _put(block.arrays, row_of(text, block.slots), np.int32(index))
    remove(text)
    text.block, text.index = block, index
    block.texts[index] = text


def remove(text: Text) -> None:
    """Frees the row of a text."""
    text.block.texts[text.index] = None


def capacity(count: int) -> int:
    """Number of rows of a block for so many texts: a power of two, but not two."""
    return padded(count) if count < 2 else max(4, padded(count))


def padded(length: int) -> int:
    """The smallest power of two that is not less; 0 for 0."""
    return 1 << (length - 1).bit_length() if length else 0


def slots_for(tokens: int) -> int:
    """Number of slots of a block for texts of so many tokens."""
    return max(LEAST_SLOTS, padded(tokens))


def grouped(
    slots: Mapping[Key, int], row_bytes: Callable[[int], float], parameter_bytes: float
) -> list[tuple[int, list[Key]]]:
    """Which texts share a block, and its slots, for texts that need these numbers of slots.

    From the smallest on, texts join those with the next larger number where the slots that this
    leaves empty have fewer bytes than the parameters, which a block of their own would have the
    step read once more. row_bytes: number of slots -> bytes of a row."""
    groups: list[tuple[int, list[Key]]] = []
    for size in sorted(set(slots.values())):
        own = [key for key, needed in slots.items() if needed == size]
        if groups:
            smaller, texts = groups[-1]
            if len(texts) * (row_bytes(size) - row_bytes(smaller)) <= parameter_bytes:
                groups.pop()
                own = texts + own
        groups.append((size, own))
    return groups


def step_bytes(
    shapes: Sequence[tuple[int, int]], row_bytes: Callable[[int], float], parameter_bytes: float
) -> float:
    """Bytes that a step reads for blocks with these numbers of rows and slots. row_bytes: number of
    slots -> bytes of a row."""
    return sum(parameter_bytes + rows * row_bytes(slots) for rows, slots in shapes)


# One row at a time, by slices: a program for each pair of shapes would be too many, and gathering
# rows by index takes several times as long on CPUs.
@functools.partial(jax.jit, static_argnums=2)
def _taken(arrays, index, slots_by_layer):
    def one(array, slots):
        row = jax.lax.dynamic_slice_in_dim(array, index, 1)
        more = slots - row.shape[2]
        return row[:, :, :slots] if more < 0 else jnp.pad(row, [(0, 0)] * 2 + [(0, more), (0, 0)])

    keys, values, logits = arrays
    moved = (tuple(map(one, each, slots_by_layer)) for each in (keys, values))
    return *moved, jax.lax.dynamic_slice_in_dim(logits, index, 1)


@functools.partial(jax.jit, donate_argnums=0)
def _put(arrays, row, index):
    return jax.tree.map(
        lambda array, one: jax.lax.dynamic_update_slice_in_dim(array, one, index, axis=0),
        arrays,
        row,
    )
