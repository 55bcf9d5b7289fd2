"""Products of a few rows with a large matrix, which take as long as the matrix takes to be read."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

FEW = 64
"""Rows."""


def by_rows_of(
    x: Float[Array, "M I"], matrix: Float[Array, "O I"], dtype: DTypeLike | None = None
) -> Float[Array, "M O"]:
    """x @ matrix.T, in `dtype`. Between 2 and 64 rows, XLA's product for CPUs keeps what stands on
    its left where it is and packs what stands on its right: with the matrix on the left it reads it
    up to twice as fast (benchmarks/few_rows.py), and the barriers keep it there."""
    plain = functools.partial(jnp.einsum, "MI,OI->MO", preferred_element_type=dtype)
    if not 1 < len(x) <= FEW:
        return plain(x, matrix)

    def matrix_first(x, matrix):
        columns = jax.lax.optimization_barrier(x.T)
        found = jnp.einsum("OI,IM->OM", matrix, columns, preferred_element_type=dtype)
        return jax.lax.optimization_barrier(found).T

    return jax.lax.platform_dependent(x, matrix, cpu=matrix_first, default=plain)
