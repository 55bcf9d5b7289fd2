"""Products of a few or many rows with the matrices of inference, [outputs, inputs], whose weights
may be narrow (`xelm.models.narrow`), each as the platform computes it fast.

On accelerators XLA reads narrow weights and converts them inside the product. On CPUs its own
products are fast in float32 alone. The library YNNPACK, a part of jaxlib, multiplies int8 by int8
and bfloat16 by bfloat16 there, of two rows and more. So that weights alone are rounded, and not
states, a row of states becomes two rows of the narrow type whose sum it is; the weights are read
once for both (benchmarks/narrow_weights.py)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from xelm.models.narrow import LARGEST, Int8Matrix

FEW = 64
"""Number of rows up to which the matrix stands on the left."""
FEW_INT8 = 32
"""Number of rows up to which weights in int8 are multiplied as they are. With more, a part at a
time becomes float32."""
_PART = 2**19
"""Weights in such a part: 2 MiB in float32, which stay in a CPU's caches."""
_FINER = 2 * LARGEST
"""A step of the first int8 of a state, in steps of the second: the first is off by half a step at
most."""


def by_rows_of(x: Float[Array, "M I"], matrix: Any, dtype: DTypeLike | None = None) -> Array:
    """The product x @ matrix.T [M, O], in `dtype`. matrix: floats [O, I], or an `Int8Matrix`.

    XLA's product for CPUs packs its right operand and reads the left one in place. For 2 to 64 rows
    a matrix of floats therefore stands on the left, where it is read up to twice as fast
    (benchmarks/few_rows.py); the barriers keep XLA from exchanging the two."""
    if is_narrow(matrix, x.dtype):
        cpu = functools.partial(_narrow_on_cpu, dtype=dtype or x.dtype)
        default = functools.partial(_converted, dtype=dtype or x.dtype)
        return jax.lax.platform_dependent(x, matrix, cpu=cpu, default=default)
    matrix = matrix.astype(x.dtype)
    plain = functools.partial(jnp.einsum, "MI,OI->MO", preferred_element_type=dtype)
    if not 1 < len(x) <= FEW:
        return plain(x, matrix)

    def matrix_first(x, matrix):
        columns = jax.lax.optimization_barrier(x.T)
        found = jnp.einsum("OI,IM->OM", matrix, columns, preferred_element_type=dtype)
        return jax.lax.optimization_barrier(found).T

    return jax.lax.platform_dependent(x, matrix, cpu=matrix_first, default=plain)


def is_narrow(matrix: Any, dtype: DTypeLike) -> bool:
    """Whether a matrix has narrower weights than the states of this dtype that it is multiplied
    with."""
    if isinstance(matrix, Int8Matrix):
        return True
    return matrix.dtype == jnp.bfloat16 and jnp.dtype(dtype) == jnp.float32


@functools.cache
def has_library() -> bool:
    """Whether XLA has YNNPACK multiply int8, in this version and on this CPU."""
    if jax.default_backend() != "cpu":
        return False

    def product(x, matrix):
        return jnp.einsum("OI,MI->OM", matrix, x, preferred_element_type=jnp.int32)

    operands = (jax.ShapeDtypeStruct((rows, 64), jnp.int8) for rows in (2, 64))
    return "ynn_fusion" in (jax.jit(product).lower(*operands).compile().as_text() or "")


def _converted(x: Array, matrix: Any, dtype: Any) -> Array:
    """The product by weights that are converted as they are read."""
    values = matrix.values if isinstance(matrix, Int8Matrix) else matrix
    found = jnp.einsum("MI,OI->MO", x, values.astype(x.dtype), preferred_element_type=jnp.float32)
    return _scaled(found, matrix).astype(dtype)


def _narrow_on_cpu(x: Array, matrix: Any, dtype: Any) -> Array:
    is_int8 = isinstance(matrix, Int8Matrix)
    if not has_library() or (is_int8 and len(x) > FEW_INT8):
        found = _in_parts(x, matrix)
    else:
        found = _int8_product(x, matrix) if is_int8 else _bfloat16_product(x, matrix)
    return _scaled(found, matrix).astype(dtype)


def _int8_product(x: Array, matrix: Int8Matrix) -> Array:
    """The product by the integers of a matrix. A row of states is two rows of int8, of which the
    second is what the rounding of the first has left: its error is 1 / (4 * 127^2) of the largest
    state at most."""
    scale = _largest(x) / LARGEST
    steps = x / jnp.maximum(scale, jnp.finfo(x.dtype).tiny)
    first = jnp.round(steps)
    second = jnp.round((steps - first) * _FINER)
    both = jnp.concatenate([first, second]).astype(jnp.int8)
    # With the matrix on the left, and no transposed operand, it is read up to twice as fast.
    found = jnp.einsum("OI,MI->OM", matrix.values, both, preferred_element_type=jnp.int32)
    # Of several rows, the sum after the transposition is the faster one.
    columns = found.astype(x.dtype) if len(x) == 1 else found.T.astype(x.dtype)
    first, second = jnp.split(columns, 2, axis=int(len(x) == 1))
    both = first + second / _FINER
    return (both.T if len(x) == 1 else both) * scale


def _largest(x: Array) -> Array:
    """The largest magnitude of each row [M, 1], float32. Floats that are not negative have the
    order of their bits as integers, of which XLA finds the largest faster."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    return jax.lax.bitcast_convert_type(bits.max(axis=1, keepdims=True), jnp.float32)


def _bfloat16_product(x: Array, matrix: Array) -> Array:
    """The product by a matrix of bfloat16. A row of states is two rows, of which the second is what
    the rounding of the first has left: its error is 2^-17 of a state at most."""
    first = jax.lax.reduce_precision(x, 8, 7)
    both = jnp.concatenate([first, x - first]).astype(jnp.bfloat16)
    found = jnp.einsum("MI,OI->MO", both, matrix, preferred_element_type=x.dtype)
    of_first, of_rest = jnp.split(found, 2)
    return of_first + of_rest


def _in_parts(x: Array, matrix: Any) -> Array:
    """The product by unscaled weights, some rows of which become floats at a time."""
    values = matrix.values if isinstance(matrix, Int8Matrix) else matrix
    count, inputs = values.shape
    parts = -(-count // max(64, _PART // inputs))
    size = -(-count // parts)  # of about one size: the last one repeats as few rows as can be
    equation = "OI,MI->OM" if len(x) <= FEW else "MI,OI->MO"

    def product(number, found):
        # The last part begins earlier where the number of rows is no multiple.
        first = jnp.minimum(number * size, count - size)
        part = jax.lax.dynamic_slice_in_dim(values, first, size).astype(x.dtype)
        part = jax.lax.optimization_barrier(part)
        operands = (part, x) if len(x) <= FEW else (x, part)
        own = jnp.einsum(equation, *operands)
        own = own.T if len(x) <= FEW else own
        return jax.lax.dynamic_update_slice_in_dim(found, own, first, axis=1)

    found = jnp.zeros((len(x), count), x.dtype)
    return product(0, found) if parts == 1 else jax.lax.fori_loop(0, parts, product, found)


def _scaled(found: Array, matrix: Any) -> Array:
    return found * matrix.scale[None] if isinstance(matrix, Int8Matrix) else found
