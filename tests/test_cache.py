"""Tokens written into a cache of keys and values, in the form of each kind of device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xelm.models.cache import store
from xelm.models.target import CPU, GIB, Target

TARGETS = [CPU, Target("tpu", 16 * GIB), Target("gpu", 16 * GIB), Target("older gpu", 16 * GIB)]
ROWS, HEADS, SLOTS, SIZE = 3, 2, 8, 4


def written(target, tokens, rows):
    """The cache after tokens at slot 2, at the last one, and beyond it; and what is expected."""
    draw = np.random.default_rng(0)
    cache = [draw.normal(size=(rows, HEADS, SLOTS, SIZE)).astype(np.float32) for _ in range(2)]
    new = [draw.normal(size=(rows, tokens, HEADS, SIZE)).astype(np.float32) for _ in range(2)]
    slots = np.asarray([2, SLOTS - 1, SLOTS])[:rows, None] + np.arange(tokens)
    expected = [array.copy() for array in cache]
    for array, values in zip(expected, new):
        for row, column in np.ndindex(slots.shape):
            if slots[row, column] < SLOTS:
                array[row, :, slots[row, column]] = values[row, column]
    arrays = jax.tree.map(jnp.asarray, (tuple(cache), *new, slots))
    return jax.jit(functools.partial(store, target=target))(*arrays), expected


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.platform)
@pytest.mark.parametrize(("tokens", "rows"), [(1, ROWS), (3, ROWS), (1, 1)])
def test_every_kind_of_device_writes_the_same_values(target, tokens, rows):
    found, expected = written(target, tokens, rows)
    jax.tree.map(np.testing.assert_array_equal, found, tuple(expected))


@pytest.mark.parametrize("tokens", [1, 16])
def test_for_gpus_the_dimensions_of_a_scatter_come_first(tokens):
    """XLA for GPUs transposes the operand of any other scatter, which is the whole cache."""
    cache = jax.ShapeDtypeStruct((4, HEADS, 64, SIZE), jnp.bfloat16)
    new = jax.ShapeDtypeStruct((4, tokens, HEADS, SIZE), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((4, tokens), jnp.int32)
    traced = jax.jit(functools.partial(store, target=Target("gpu", 16 * GIB))).trace(
        (cache, cache), new, new, slots
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r'"stablehlo.scatter"', text)) == 2
    assert set(re.findall(r"inserted_window_dims = \[([\d, ]+)\]", text)) == {"0, 1, 2"}
    assert set(re.findall(r"scatter_dims_to_operand_dims = \[([\d, ]+)\]", text)) == {"0, 1, 2"}
    assert "stablehlo.transpose" not in text
