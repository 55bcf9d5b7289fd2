"""The cache of keys and values: what a decoder has computed of the sequences that it continues."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from xelm.models.config import ModelConfig

LayerCache = tuple[Float[Array, "R K S H"], Float[Array, "R K S H"]]
"""Keys and values of one layer."""


class Cache(NamedTuple):
    """Keys and values of the tokens of R sequences, by layer; a token's slot is its position. Each
    layer has its arrays, heads before positions, so that attention reads them without a copy."""

    keys: tuple[Float[Array, "R K S H"], ...]
    values: tuple[Float[Array, "R K S H"], ...]
    length: Int[Array, " R"]
    """Number of tokens of each sequence; the slots from there on are not in use."""


def empty_cache(config: ModelConfig, rows: int, slots: int, dtype: DTypeLike) -> Cache:
    """A cache for `rows` sequences of up to `slots` tokens each."""
    shape = (rows, config.key_head_count, slots, config.head_size)
    keys, values = (
        tuple(jnp.zeros(shape, dtype) for _ in range(config.layer_count)) for _ in range(2)
    )
    return Cache(keys, values, jnp.zeros(rows, jnp.int32))


def store(
    cache: LayerCache,
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    slots: Int[Array, "B T"],
) -> LayerCache:
    """The cache of one layer with these keys and values of its rows, in order, at `slots`. What has
    a slot beyond the last is dropped."""
    rows = jnp.arange(len(key))[:, None]
    if key.shape[:2] == (1, 1):
        # One more token, which is dropped: XLA makes a slice of a single update, writes that once
        # for attention and once for the cache, and copies the cache for it.
        rows, slots = jnp.asarray([[0], [1]]), jnp.concatenate([slots, slots])
        key, value = jnp.concatenate([key, key]), jnp.concatenate([value, value])
    keys = cache[0].at[rows, :, slots].set(key.astype(cache[0].dtype), mode="drop")
    values = cache[1].at[rows, :, slots].set(value.astype(cache[1].dtype), mode="drop")
    return keys, values
