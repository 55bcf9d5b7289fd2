"""float32 parameters in two halves: what a step reads, and what that lacks of the whole.

With products in bfloat16 a step reads bfloat16 matrices and finds bfloat16 gradients of them, while
the masters that it moves are float32 to the last bit. Both halves take the four bytes of the master
alone, as with the `store_param_remainders` of NVIDIA Apex's DistributedFusedAdam.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int16

from xelm.models.parameters import by_path, matrices

Rests = Mapping[str, Any]
"""Path of a matrix -> the sixteen bits that its bfloat16 lacks; empty if nothing is halved."""


def halved(masters: Mapping[str, Any], dtype: str) -> tuple[dict[str, Any], Rests]:
    """What a step with products in this dtype reads of float32 parameters, and the rests: matrices
    are halved for bfloat16, vectors never are."""
    if dtype == "float32":
        return dict(masters), {}
    halves = {
        path: _halves(leaf)
        for (path, leaf), cut in zip(by_path(masters).items(), by_path(matrices(masters)).values())
        if cut
    }
    read = by_path(masters) | {path: upper for path, (upper, _) in halves.items()}
    return unflatten_dict(read, sep="/"), {path: rest for path, (_, rest) in halves.items()}


def whole(read: Mapping[str, Any], rests: Rests) -> dict[str, Any]:
    """The float32 parameters that were halved, to the last bit."""
    joined = {
        path: _joined(leaf, rests[path]) if path in rests else leaf
        for path, leaf in by_path(read).items()
    }
    return unflatten_dict(joined, sep="/")


def _halves(master: Float[Array, "*S"]) -> tuple[Array, Int16[Array, "*S"]]:
    bits = jax.lax.bitcast_convert_type(master, jnp.int32)
    # Rounded half up, so that the rest always fits: to even, a tie would leave 2^15.
    upper = (bits + 0x8000) & ~0xFFFF
    rest = bits - upper
    nearest = jax.lax.bitcast_convert_type(upper, jnp.float32)
    return nearest.astype(jnp.bfloat16), rest.astype(jnp.int16)


def _joined(upper: Array, rest: Int16[Array, "*S"]) -> Float[Array, "*S"]:
    bits = jax.lax.bitcast_convert_type(upper.astype(jnp.float32), jnp.int32)
    return jax.lax.bitcast_convert_type(bits + rest.astype(jnp.int32), jnp.float32)
