"""The largest of many values, such as those of all tokens of a vocabulary: block by block."""

import jax
import jax.numpy as jnp

BLOCK = 256
"""Columns of a block: near the square root of a large vocabulary, so both steps are short."""


@jax.jit
def largest_columns(values):
    """The column of the largest value of each row, the first of equals; any for rows with nan."""
    # jnp.argmax takes ten times as long on CPUs, where a maximum is found many numbers at a time.
    block = _block_maxima(values).argmax(axis=1)
    window, columns = windows(values, block[:, None])
    first = window[:, 0].argmax(axis=1)
    return jnp.take_along_axis(columns[:, 0], first[:, None], axis=1)[:, 0]


def _block_maxima(values):
    return in_blocks(values, -jnp.inf).max(axis=2)


def in_blocks(values, filling):
    """Values [B, V] as [B, blocks, columns], the last block filled up."""
    columns = min(BLOCK, values.shape[1])
    padded = jnp.pad(values, ((0, 0), (0, -values.shape[1] % columns)), constant_values=filling)
    return padded.reshape(len(values), -1, columns)


def windows(values, blocks):
    """These blocks [B, n] of each row's values, and their columns, both [B, n, columns]."""
    size = values.shape[1]
    width = min(BLOCK, size)
    # The last block reaches back into the one before: what is not its own is -inf.
    start = jnp.minimum(blocks * width, size - width)

    def cut(row, first):
        return jax.lax.dynamic_slice(row, (first,), (width,))

    found = jax.vmap(jax.vmap(cut, (None, 0)))(values, start)
    columns = start[..., None] + jnp.arange(width)[None, None]
    return jnp.where(columns >= blocks[..., None] * width, found, -jnp.inf), columns


def top(values, count):
    """The `count` largest values of each row and their columns, as `jax.lax.top_k`: they lie in as
    many blocks, those with the largest maxima."""
    if count * BLOCK >= values.shape[1]:
        return jax.lax.top_k(values, count)
    parts = in_blocks(values, -jnp.inf)
    _, blocks = jax.lax.top_k(parts.max(axis=2), count)
    # In their order, so that of equal values the first are taken.
    blocks = jnp.sort(blocks, axis=1)
    found = jnp.take_along_axis(parts, blocks[:, :, None], axis=1)
    largest, places = jax.lax.top_k(found.reshape(len(values), -1), count)
    block = jnp.take_along_axis(blocks, places // BLOCK, axis=1)
    return largest, block * BLOCK + places % BLOCK
