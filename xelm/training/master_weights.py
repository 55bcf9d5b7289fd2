"""float32 master weights in two halves: the bfloat16 matrices that a step reads, and remainders.

With products in bfloat16 a step reads bfloat16 matrices and computes bfloat16 gradients, while the
master weights that it updates are float32 to the last bit. Both halves together take the four bytes
of a master weight, as with `store_param_remainders` of NVIDIA Apex's DistributedFusedAdam.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int16

from xelm.models.parameters import by_path, matrices

Remainders = Mapping[str, Any]
"""Path of a matrix -> the lower sixteen bits of its master weights; empty if nothing is split."""


def split_weights(masters: Mapping[str, Any], dtype: str) -> tuple[dict[str, Any], Remainders]:
    """Splits float32 parameters into those that a step with products in `dtype` reads, and the
    remainders: matrices are split for bfloat16, vectors never are."""
    if dtype == "float32":
        return dict(masters), {}
    read, split, remainders = by_path(masters), by_path(matrices(masters)), {}
    for path in [path for path in read if split[path]]:
        read[path], remainders[path] = _upper_and_remainder(read[path])
    return unflatten_dict(read, sep="/"), remainders


def join_weights(read: Mapping[str, Any], remainders: Remainders) -> dict[str, Any]:
    """The float32 parameters that were split, to the last bit."""
    joined = {
        path: _joined(leaf, remainders[path]) if path in remainders else leaf
        for path, leaf in by_path(read).items()
    }
    return unflatten_dict(joined, sep="/")


def _upper_and_remainder(master: Float[Array, "*S"]) -> tuple[Array, Int16[Array, "*S"]]:
    bits = jax.lax.bitcast_convert_type(master, jnp.int32)
    # The lower bits, with their sign: so the upper ones are rounded half up, and the remainder
    # always fits; to even, a tie would leave 2^15. Computed from the upper ones, it would take
    # XLA for TPUs a second pass over all weights and averages.
    remainder = bits.astype(jnp.int16)
    upper = bits - remainder.astype(jnp.int32)
    nearest = jax.lax.bitcast_convert_type(upper, jnp.float32)
    return nearest.astype(jnp.bfloat16), remainder


def _joined(upper: Array, remainder: Int16[Array, "*S"]) -> Float[Array, "*S"]:
    bits = jax.lax.bitcast_convert_type(upper.astype(jnp.float32), jnp.int32)
    return jax.lax.bitcast_convert_type(bits + remainder.astype(jnp.int32), jnp.float32)
