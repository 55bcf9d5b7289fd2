"""Fingerprints of arrays, computed on their devices, to check that a checkpoint reads as saved.

They show damage, not forgery: 32 bits for each array, which do not depend on how it is spread over
devices. A device reads its own part once, and nothing but the sums passes between devices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def fingerprints(tree: Any) -> dict[str, str]:
    """Path of each array in a tree of arrays on one mesh -> eight hexadecimal digits. Equal bits
    give equal digits on any mesh; other bits, or the same at other places, give others but once in
    2 ** 32."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree))
    mesh = leaves[0].sharding.mesh
    with jax.set_mesh(mesh):
        found = np.asarray(_program(mesh)(leaves))
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path in paths)
    return {name: f"{number:08x}" for name, number in zip(names, found.tolist())}


@functools.lru_cache(maxsize=8)
def _program(mesh: Mesh):
    return jax.jit(
        lambda leaves: jnp.stack([_fingerprint(leaf) for leaf in leaves]),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def _fingerprint(array: jax.Array) -> jax.Array:
    """The sum, modulo 2 ** 32, of a hash of each element's bits and place."""
    bits = jax.lax.bitcast_convert_type(array, _BITS[array.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        place = place * jnp.uint32(size) + along
    # The finaliser of MurmurHash3 (Appleby 2008). A plain weighted sum would be blind to a block
    # of equal floats that turns to zeros: their low bits, and those of its weights, cancel.
    mixed = bits ^ (place * jnp.uint32(0x9E3779B1) + jnp.uint32(0x7F4A7C15))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
