"""Products of a few rows with a large matrix, whose time is that of reading the matrix."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

FEW = 64
"""Number of rows up to which the matrix stands on the left."""


def by_rows_of(
    x: Float[Array, "M I"], matrix: Float[Array, "O I"], dtype: DTypeLike | None = None
) -> Float[Array, "M O"]:
    """The product x @ matrix.T, in `dtype`.

    XLA's product for CPUs packs its right operand and reads the left one in place. For 2 to 64 rows
    the matrix therefore stands on the left, where it is read up to twice as fast
    (benchmarks/few_rows.py); the barriers keep XLA from exchanging the two."""
    plain = functools.partial(jnp.einsum, "MI,OI->MO", preferred_element_type=dtype)
    if not 1 < len(x) <= FEW:
        return plain(x, matrix)

    def matrix_first(x, matrix):
        columns = jax.lax.optimization_barrier(x.T)
        found = jnp.einsum("OI,IM->OM", matrix, columns, preferred_element_type=dtype)
        return jax.lax.optimization_barrier(found).T

    return jax.lax.platform_dependent(x, matrix, cpu=matrix_first, default=plain)
