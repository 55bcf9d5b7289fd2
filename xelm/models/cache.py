"""The cache of keys and values: what a decoder has computed of the sequences that it continues."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from xelm.models.config import ModelConfig

LayerCache = tuple[Float[Array, "_ K S H"], Float[Array, "_ K S H"]]
"""Keys and values of one layer, of all rows of a cache or some."""


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
    rows: Int[Array, " B"] | None,
    slots: Int[Array, "B T"],
) -> tuple[LayerCache, LayerCache]:
    """The cache of one layer with these keys and values at `slots` of `rows`, and those rows of it.

    rows: None if the sequences are all rows of the cache, in order. A row or slot beyond the last
    is dropped, and a row beyond the last is read as some other row."""
    places = (jnp.arange(len(key)) if rows is None else rows)[:, None]
    keys = cache[0].at[places, :, slots].set(key.astype(cache[0].dtype), mode="drop")
    values = cache[1].at[places, :, slots].set(value.astype(cache[1].dtype), mode="drop")
    if rows is None:
        return (keys, values), (keys, values)
    return (keys, values), (keys.at[rows].get(mode="clip"), values.at[rows].get(mode="clip"))
