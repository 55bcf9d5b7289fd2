"""Weights in fewer bits than float32, for inference: which parameters are stored so, and how.

In "int8" every matrix has integers from -127 to 127 and a scale for each of its rows, which are its
outputs, or the ids of a table: the largest of a row is 127 (symmetric quantisation by channel, as
in Jacob et al. 2018, arXiv 1712.05877, section 2, without a zero point). A dequantised weight is
within half a step of the original. Norms, biases, factors of adapters and other small parameters
stay in float32. Products with such matrices are in `xelm.models.products`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

INT8 = "int8"
LARGEST = 127
"""Largest magnitude of an integer: -128 has no counterpart."""
_TABLES = ("embedding", "head")
_SMALL = ("scale", "bias", "alpha_p", "alpha_n")
"""Ends of the names of parameters that are no matrices."""
_ROWS_AT_ONCE = 2**22
"""Values that are quantised at once on the host."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """A matrix [O, I] in int8: row o is `values[o] * scale[o]`. Its two arrays are leaves of a tree
    of parameters."""

    values: Any
    """Int8 [O, I]."""
    scale: Any
    """Float32 [O]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Numbers of outputs and inputs."""
        return self.values.shape

    def __getitem__(self, index: Any) -> Any:
        """Rows by number, dequantised, float32; all of it, as it is, for `...`."""
        if index is Ellipsis:
            return self
        return self.values[index].astype(np.float32) * self.scale[index][..., None]


def quantised(matrix: Float[np.ndarray, "O I"]) -> Int8Matrix:
    """A matrix on the host in int8, with a scale for each row."""
    matrix = np.asarray(matrix)
    values, scales = np.empty(matrix.shape, np.int8), np.empty(len(matrix), np.float32)
    step = max(1, _ROWS_AT_ONCE // max(1, matrix.shape[1]))
    for first in range(0, len(matrix), step):
        rows = slice(first, first + step)
        part = matrix[rows].astype(np.float32)
        scale = np.abs(part).max(axis=1, initial=0) / np.float32(LARGEST)
        # A row of zeros, or of numbers whose 127th part is no normal number, is a row of zeros.
        scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
        values[rows] = np.clip(np.rint(part / scale[:, None]), -LARGEST, LARGEST)
        scales[rows] = scale
    return Int8Matrix(values, scales)


def narrowed(path: str, array: np.ndarray, dtype: str) -> Any:
    """A parameter on the host, in the layout of inference, as it is stored where weights have this
    dtype. path: as in `by_path`; of a layer with or without "blocks/"."""
    if dtype == INT8:
        return quantised(array) if _is_int8(path) else np.ascontiguousarray(array, np.float32)
    return np.ascontiguousarray(array, dtype if is_matrix(path) else np.float32)


def stored_as(parameters: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Parameters on the host, in float32 and the layout of inference, as they are stored where
    weights have this dtype."""

    def converted(tree: Any, path: str) -> Any:
        if isinstance(tree, tuple):  # of layers
            return tuple(converted(each, path) for each in tree)
        if isinstance(tree, Mapping):
            return {name: converted(each, f"{path}/{name}") for name, each in tree.items()}
        return narrowed(path.removeprefix("/"), tree, dtype)

    return converted(parameters, "")


def whole(table: Any) -> np.ndarray:
    """A table on the host with ordinary numbers: of one in int8, what its rows stand for."""
    return np.asarray(table[:] if isinstance(table, Int8Matrix) else table)


def compute_dtype(dtype: str, platform: str | None = None) -> str:
    """The dtype of products with weights of this dtype, and of the caches of keys and values:
    float32 on CPUs, which compute in few others fast; elsewhere that of the weights, and bfloat16
    for int8. platform: None: that of this process."""
    if (platform or jax.default_backend()) == "cpu":
        return "float32"
    return "bfloat16" if dtype == INT8 else dtype


def stored_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """Bytes of parameters of these shapes, by path and stacked over layers, in this dtype."""
    return sum(_bytes(path, shape, dtype) for path, shape in shapes.items())


def _bytes(path: str, shape: tuple[int, ...], dtype: str) -> int:
    size = math.prod(shape)
    if not is_matrix(path) or (dtype == INT8 and not _is_int8(path)):
        return 4 * size
    if dtype != INT8:
        return size * np.dtype(dtype).itemsize
    # Weights of layers are [inputs, outputs] in training, tables have a row for each id.
    rows = shape[0] if path in _TABLES else size // shape[-2]
    return size + 4 * rows


def is_matrix(path: str) -> bool:
    """Whether the parameter at a path is a matrix (stacked over layers or not), and no scale, bias
    or factor of an activation."""
    # Stacked over layers, a norm's scale has two dimensions: tell by the name, not by the rank.
    return not path.endswith(_SMALL)


def _is_int8(path: str) -> bool:
    """Whether the parameter at a path becomes int8: the matrix of a dense layer but a router, or a
    large table."""
    weight = path.endswith("/weight") and not path.endswith("router/weight")
    return weight or path in _TABLES
