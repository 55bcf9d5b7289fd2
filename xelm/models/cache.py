"""The cache of keys and values: what a decoder has computed of the sequences that it continues."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from xelm.models.config import ModelConfig
from xelm.models.target import CPU, Target

LayerCache = tuple[Float[Array, "R K S H"], Float[Array, "R K S H"]]
"""Keys and values of one layer."""


LONGEST_PIECE = 256
"""Largest number of tokens that are added to a cache in one call."""
_TPU_LANES = 128
"""Numbers beside each other in a TPU's registers."""
_LEAST_RING = 64
"""Smallest number of slots of a ring."""


class Cache(NamedTuple):
    """Keys and values of the tokens of R sequences, by layer; a token's slot is its position or, in
    a ring (`ring_slots`), what is left of it divided by the number of slots. Each layer has its
    arrays, heads before positions, so that attention reads them without a copy."""

    keys: tuple[Float[Array, "R K S H"], ...]
    values: tuple[Float[Array, "R K S H"], ...]
    length: Int[Array, " R"]
    """Number of tokens of each sequence; the slots from there on are not in use."""


def ring_slots(config: ModelConfig) -> int | None:
    """Number of slots of the local layers' caches, which are rings where a cache has more slots:
    no token sees further back than the window, so later tokens take the slots of those that nobody
    sees any more. None: the model has no such layers.

    There are slots for the window and the longest piece, whose tokens are all stored before the
    first of them looks back. A power of two, as of other caches, leaves some more: as many tokens
    may be given up at the end of a text that another one continues differently."""
    if not config.local_layers or config.local_window is None or config.positions == "alibi":
        return None
    needed = config.local_window + LONGEST_PIECE
    return max(_LEAST_RING, 1 << (needed - 1).bit_length())


def slots_by_layer(config: ModelConfig, slots: int) -> tuple[int, ...]:
    """Number of slots of each layer in a cache for so many tokens."""
    ring = ring_slots(config)
    if ring is None:
        return (slots,) * config.layer_count
    local = min(slots, ring)
    return tuple(local if n in config.local_layers else slots for n in range(config.layer_count))


def empty_cache(config: ModelConfig, rows: int, slots: int, dtype: DTypeLike) -> Cache:
    """A cache for `rows` sequences of up to `slots` tokens each."""
    shapes = [
        (rows, config.key_head_count, own, config.head_size)
        for own in slots_by_layer(config, slots)
    ]
    keys, values = (tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(2))
    return Cache(keys, values, jnp.zeros(rows, jnp.int32))


def longer_cache(config: ModelConfig, cache: Cache, slots: int) -> Cache:
    """The same cache with further slots."""
    keys, values = _padded((cache.keys, cache.values), slots_by_layer(config, slots))
    return Cache(keys, values, cache.length)


@functools.partial(jax.jit, static_argnums=1)
def _padded(arrays, slots):
    def one(array, own):
        return jnp.pad(array, [(0, 0), (0, 0), (0, own - array.shape[2]), (0, 0)])

    return tuple(tuple(map(one, each, slots)) for each in arrays)


def store(
    cache: LayerCache,
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    slots: Int[Array, "B T"],
    target: Target = CPU,
) -> LayerCache:
    """The cache of one layer with these keys and values of its rows, in order, at `slots`. What has
    a slot beyond the last is dropped.

    target: the kind of device that the program is compiled for. The same values are written in the
    form that its compiler needs no copy of the cache for."""
    if target.platform == "tpu" and key.shape[1] == 1 and key.shape[3] % _TPU_LANES:
        return _compared(cache[0], key, slots), _compared(cache[1], value, slots)
    if target.platform in ("gpu", "older gpu"):
        return _scattered_by_head(cache[0], key, slots), _scattered_by_head(cache[1], value, slots)
    rows = jnp.arange(len(key))[:, None]
    if key.shape[:2] == (1, 1):
        # One more token, which is dropped: XLA makes a slice of a single update, writes that once
        # for attention and once for the cache, and copies the cache for it.
        rows, slots = jnp.asarray([[0], [1]]), jnp.concatenate([slots, slots])
        key, value = jnp.concatenate([key, key]), jnp.concatenate([value, value])
    keys = cache[0].at[rows, :, slots].set(key.astype(cache[0].dtype), mode="drop")
    values = cache[1].at[rows, :, slots].set(value.astype(cache[1].dtype), mode="drop")
    return keys, values


def _compared(
    kept: Float[Array, "R K S H"], new: Float[Array, "B 1 K H"], slots: Int[Array, "B 1"]
) -> Float[Array, "R K S H"]:
    """One token of each row, written by comparing each slot with it, which is fused with the
    reading of attention. In heads that do not fill the lanes of a TPU, tokens lie side by side, and
    for a scatter libtpu brings the whole cache into another layout and back. In others a scatter
    takes no copy, and half the cycles of this."""
    here = jnp.arange(kept.shape[2])[None] == slots
    return jnp.where(here[:, None, :, None], new.transpose(0, 2, 1, 3).astype(kept.dtype), kept)


def _scattered_by_head(
    kept: Float[Array, "R K S H"], new: Float[Array, "B T K H"], slots: Int[Array, "B T"]
) -> Float[Array, "R K S H"]:
    """Tokens of each row, written head by head: the written dimensions come first. Where they have
    others between them, XLA for GPUs transposes the operand of a scatter."""
    rows = jnp.arange(len(new))[:, None, None]
    heads = jnp.arange(new.shape[2])[None, None]
    return kept.at[rows, heads, slots[:, :, None]].set(new.astype(kept.dtype), mode="drop")
