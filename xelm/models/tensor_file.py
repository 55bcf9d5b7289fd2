"""Files of weights in the format of safetensors, written one tensor after the other. The library
takes all tensors of a file at once, so that the host would hold gigabytes."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clustering.hub_files import split_weights, write_index

# In the order in which the library writes them.
_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class TensorKind(NamedTuple):
    """What a file states of a tensor before its values."""

    dtype: str
    """As safetensors calls it: F32 and so on."""
    shape: tuple[int, ...]

    @classmethod
    def of(cls, dtype: str, shape: Iterable[int]) -> "TensorKind":
        """The kind of a tensor with a dtype of NumPy, by its name."""
        return cls(_DTYPES[dtype], tuple(shape))

    @classmethod
    def stored(cls, tensor: Any) -> "TensorKind":
        """The kind of what is read of a stored tensor, a lazy slice."""
        shape = tuple(tensor.get_shape())
        if not shape or not all(shape):
            return cls(tensor.get_dtype(), shape)
        # That of its values, which are float32 where products are added to it.
        return cls.of(str(tensor[:1].dtype), shape)

    @property
    def width(self) -> int:
        """Bytes of a value."""
        return int(self.dtype.lstrip("BF")) // 8

    @property
    def size(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.width


def write_tensors(
    directory: Path, kinds: Mapping[str, TensorKind], tensors: Iterable[np.ndarray]
) -> None:
    """Writes the weights of a checkpoint into its directory: into one file, or several with an
    index (`split_weights`). tensors: those of `kinds`, in the same order; each is let go of before
    the next is taken."""
    sizes = {name: kind.size for name, kind in kinds.items()}
    files, taken = split_weights(sizes), iter(tensors)
    if len(files) > 1:
        write_index(directory, files, sum(sizes.values()))
    for file, names in files.items():
        _write_file(directory / file, {name: kinds[name] for name in names}, taken)


def _write_file(path: Path, kinds: Mapping[str, TensorKind], tensors: Iterator[np.ndarray]) -> None:
    # As the library orders them, so that the same tensors are the same file: wide values first, so
    # that all lie at multiples of their width, then by name.
    order = [*_DTYPES.values()]
    begins, end = {}, 0
    for name in sorted(kinds, key=lambda name: (order.index(kinds[name].dtype), name)):
        begins[name], end = end, end + kinds[name].size
    entries = {
        name: {
            "dtype": kinds[name].dtype,
            "shape": list(kinds[name].shape),
            "data_offsets": [begin, begin + kinds[name].size],
        }
        for name, begin in begins.items()
    }
    stated = {"__metadata__": {"format": "pt"}, **entries}
    header = json.dumps(stated, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, kind in kinds.items():
            array = next(tensors)
            if kind != TensorKind.of(str(array.dtype), array.shape):
                raise ValueError(f"{name} must be {kind}; got {array.dtype} {array.shape}")
            file.seek(8 + len(header) + begins[name])
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array
