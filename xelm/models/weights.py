"""The weights of a checkpoint: tensors in safetensors, one file or several, never a pickle. The Hub
has one tensor a layer; the family's table says which of our parameters it holds."""

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open

from clustering.errors import UserError
from xelm.models.config import ModelConfig
from xelm.models.families.family import Family, Tensor
from xelm.models.layout import Range, join, stored_shape, take
from xelm.models.narrow import narrowed
from xelm.models.parameters import by_path, is_weight, shapes, stacked
from xelm.models.stored import open_tensors
from xelm.models.tensor_file import TensorKind, write_tensors

ROWS_COMPARED = 4096
"""Rows of two large tables that are compared at once."""
DTYPES = ("F32", "BF16", "F16", "F64")
"""Dtypes of weights that are read, as safetensors calls them."""
# Bits that are all set only in NaN and infinity.
_EXPONENTS = {"F64": 0x7FF << 52, "F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}
VALUES_CHECKED = 2**24
"""Values of a tensor that are checked at once."""
NARROW = {"BF16": "bfloat16", "F16": "float16"}
GATHERED_BYTES = 2**28
"""Bytes of a parameter that are gathered from several hosts at once; each device holds as many."""


class Weights:
    """The weights of a checkpoint directory, opened and checked against the shape it declares.
    Missing, unknown and misshapen tensors are listed in one UserError."""

    def __init__(self, directory: str | Path, kind: Family, config: ModelConfig):
        wanted = {path: leaf.shape for path, leaf in by_path(shapes(config)).items()}
        self._config = config
        self._layers = _layer_shapes(wanted)
        self._stored = open_tensors(directory, kind)
        self._constants = _constants(kind, config)
        self._rows = _compare(directory, kind, wanted, config, self._stored)
        self._homes = {path: (name, row) for name, row in self._rows.items() for path in row.paths}

    @property
    def dtype(self) -> str:
        """Name of the weights' dtype in NumPy; float32 if they have several, or float64."""
        found = {
            self._stored[name].get_dtype()
            for name, _, _ in _named(self._rows, self._config)
            if name in self._stored
        }
        return NARROW.get(found.pop(), "float32") if len(found) == 1 else "float32"

    def part(self, path: str, ranges: Sequence[Range], dtype: np.dtype) -> np.ndarray:
        """The part of a parameter in these ranges, one a dimension. Reads no more than that."""
        if not stacked(path):
            return np.ascontiguousarray(self._take(path, None, ranges), dtype)
        (first, last), rest = ranges[0], ranges[1:]
        target = np.empty((last - first, *(b - a for a, b in rest)), dtype)
        for layer in range(first, last):
            target[layer - first] = self._take(path, layer, rest)
        return target

    def for_inference(self, path: str, layer: int | None, dtype: str) -> Any:
        """A parameter in the layout of inference, as it is stored where weights have this dtype
        (`narrowed`); of one layer if it is stacked."""
        found = self._take(path, layer, [(0, size) for size in self._layers[path]])
        return narrowed(path, found.T if is_weight(path) else found, dtype)

    def name_of(self, path: str, layer: int | None) -> str:
        """Name in the family's table of the tensor that has a parameter, of one layer if it is
        stacked."""
        name, _ = self._homes[path]
        return name if layer is None else name.format(layer)

    def copy(self, directory: Path, dtype: str | None = None) -> None:
        """Writes the tensors by the names in the family's table beside an existing config.json, one
        after the other: bit for bit as they are stored, or in `dtype`. Of tied tensors only one is
        written."""
        stored = {
            name: self._stored[name]
            for name, _, _ in _named(self._rows, self._config)
            if name in self._stored
        }
        stored |= {name: self._stored[name] for name in self._constants}
        kinds = {name: TensorKind.stored(tensor) for name, tensor in stored.items()}
        if dtype is not None:
            kinds = {name: TensorKind.of(dtype, kind.shape) for name, kind in kinds.items()}

        def values(name: str) -> np.ndarray:
            found = whole_tensor(stored[name])
            return found if dtype is None else _narrowed(name, found, dtype)

        write_tensors(directory, kinds, map(values, stored))

    def _take(self, path: str, layer: int | None, ranges: Sequence[Range]) -> np.ndarray:
        (_, tensor), name = self._homes[path], self.name_of(path, layer)
        if name not in self._stored:
            # The norm that the first layer may lack; nothing reads it.
            return np.full([b - a for a, b in ranges], 1 - self._config.norm_offset)
        size = self._config.head_size
        return take(self._stored[name], tensor, path, self._layers, ranges, size)


def tensor_without_numbers(path: Path) -> str | None:
    """The first tensor of a safetensors file with NaN or infinity in it; None if there is none, or
    if the file cannot be opened (loading it then says why). Reads a part of a tensor at a time."""
    try:
        file = safe_open(path, framework="np")
    except (SafetensorError, OSError):
        return None
    with file:
        for name in file.keys():  # noqa: SIM118 (not a dictionary)
            part = file.get_slice(name)
            shape, dtype = part.get_shape(), part.get_dtype()
            if dtype not in _EXPONENTS or not all(shape):
                continue
            if not shape:
                parts = iter([file.get_tensor(name)])
            else:
                rows, last = max(1, VALUES_CHECKED // math.prod(shape[1:])), shape[0]
                parts = (part[a : min(a + rows, last)] for a in range(0, last, rows))
            if not all(_finite(values, _EXPONENTS[dtype]) for values in parts):
                return name
    return None


def _finite(values: np.ndarray, exponent: int) -> bool:
    # By their bits: NumPy tests values of bfloat16 one by one.
    bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
    return not ((bits & bits.dtype.type(exponent)) == exponent).any()


def stored_tensors(
    kind: Family, config: ModelConfig, flat: Mapping[str, Any], dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of each tensor of a checkpoint with these parameters, one after the other, in
    `dtype`. Parameters that are spread over several hosts are gathered on each host, one layer at a
    time, so every host must take all tensors."""
    for name, layer, tensor in _named(_table_rows(kind, flat), config):
        parts = [flat[path] if layer is None else flat[path][layer] for path in tensor.paths]
        arrays = [_narrowed(name, on_host(part, dtype), dtype) for part in parts]
        yield name, join(tensor, arrays, config.head_size)
        del parts, arrays  # before the next ones are made
    for name, value in _constants(kind, config).items():
        yield name, np.asarray(value, dtype)


def on_host(array: Any, dtype: str) -> np.ndarray:
    """A complete array on this host; gathered in `dtype` if it is spread over several hosts, except
    for float16, whose range `_narrowed` checks."""
    if not _on_other_hosts(array):
        return np.asarray(array)
    dtype = array.dtype if dtype == "float16" else dtype
    parts = (array[rows].astype(dtype) for rows in gathered_rows(array.shape, array.nbytes))
    return np.concatenate([multihost_utils.process_allgather(part, tiled=True) for part in parts])


def _on_other_hosts(array: Any) -> bool:
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def gathered_rows(shape: Sequence[int], size: int) -> Iterator[slice]:
    """Rows of an array of `size` bytes that are brought to every device at once, part after part:
    no more than `GATHERED_BYTES`, or a single row."""
    rows = max(1, GATHERED_BYTES * shape[0] // size)
    return (slice(a, min(a + rows, shape[0])) for a in range(0, shape[0], rows))


def _narrowed(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # checked below
        found = array.astype(dtype, copy=False)
    if dtype == "float16" and (np.isinf(found) & np.isfinite(array)).any():
        raise UserError(f"{name} has values beyond the range of float16; write it as float32")
    return found


def write_weights(
    directory: Path,
    kind: Family,
    config: ModelConfig,
    flat: Mapping[str, Any],
    dtype: str,
    tensors: Iterator[tuple[str, np.ndarray]],
) -> None:
    """Writes `stored_tensors` of these parameters beside an existing config.json: into one file, or
    several with an index (`split_weights`). The host holds one tensor at once."""
    layers = _layer_shapes({p: v.shape for p, v in flat.items()})
    kinds = {
        name: TensorKind.of(dtype, stored_shape(tensor, layers))
        for name, _, tensor in _named(_table_rows(kind, flat), config)
    }
    kinds |= dict.fromkeys(_constants(kind, config), TensorKind.of(dtype, ()))
    # Not a generator, which would hold a tensor while the next is made.
    write_tensors(directory, kinds, map(operator.itemgetter(1), tensors))


def whole_tensor(stored: Any) -> np.ndarray:
    """The values of a stored tensor, a lazy slice; contiguous."""
    return np.ascontiguousarray(stored[:]) if stored.get_shape() else stored[...]


def _compare(
    directory: str | Path,
    kind: Family,
    wanted: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
    stored: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Rows of the family's table for these parameters; UserError for other stored tensors."""
    rows = _table_rows(kind, wanted)
    layers = _layer_shapes(wanted)
    expected = {name: tensor for name, _, tensor in _named(rows, config)}
    copies = dict(kind.copies)
    if config.tie_embeddings:
        heads = (name for name, tensor in kind.tensors.items() if tensor.paths == ("head",))
        embedding = next(name for name, tensor in rows.items() if tensor.paths == ("embedding",))
        copies |= dict.fromkeys(heads, embedding)
    constants = _constants(kind, config)
    missing = [name for name in (*expected, *constants) if name not in stored]
    unknown = [name for name in stored if name not in {*expected, *copies, *constants}]
    faults = [f"missing {name}" for name in missing]
    faults += [f"unknown {n}" for n in unknown if not any(part in n for part in kind.ignored)]
    for name, tensor in expected.items():
        if name in stored:
            shape, found = stored_shape(tensor, layers), tuple(stored[name].get_shape())
            if found != shape:
                faults.append(f"{name} has shape {found}, config.json says {shape}")
            if (values := stored[name].get_dtype()) not in DTYPES:
                faults.append(f"{name} has values of type {values}; wanted {', '.join(DTYPES)}")
    if not faults:
        faults += [
            f"{name} must be {value} in this family; got {stored[name][...]}"
            for name, value in constants.items()
            if stored[name].get_shape() or stored[name][...] != _rounded(value, stored[name])
        ]
        faults += [
            f"{name} is not the same as {other}, to which it is tied"
            for name, other in copies.items()
            if name in stored and not _equal(stored[name], stored[other])
        ]
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        lost = [expected[name].paths[0] for name in missing if name in expected]
        if any(path in ("head", "head_bias") or path.startswith("transform/") for path in lost):
            more += f". {_without_head(kind, config)}"
        raise UserError(
            f"{directory} does not match its config.json: {'; '.join(faults[:5])}{more}"
        )
    return rows


def _without_head(kind: Family, config: ModelConfig) -> str:
    """What to take instead of a checkpoint that was saved without its language-model head."""
    if config.causal:
        return (
            "It was saved without its language-model head, needed for training. Take the language "
            "model that it was made from"
        )
    return (
        "It was saved without the head that predicts masked tokens, needed for training. One that "
        f"has it: hf download {kind.with_head} --local-dir DIR"
    )


def _table_rows(kind: Family, paths: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rows of the family's table for these parameters, each of which has one."""
    rows = {name: t for name, t in kind.tensors.items() if all(path in paths for path in t.paths)}
    without = set(paths) - {path for tensor in rows.values() for path in tensor.paths}
    if without:
        raise UserError(f"this family has no tensor for {', '.join(sorted(without)[:5])}")
    return rows


def _named(
    rows: Mapping[str, Tensor], config: ModelConfig
) -> Iterator[tuple[str, int | None, Tensor]]:
    """Name in the checkpoint, layer and row of the table of every tensor that is stored."""
    for name, tensor in rows.items():
        if "{}" not in name:
            yield name, None, tensor
            continue
        absent = not config.first_norm and tensor.paths[0].startswith("blocks/attention_norm/")
        for layer in range(1 if absent else 0, config.layer_count):
            yield name.format(layer), layer, tensor


def _constants(kind: Family, config: ModelConfig) -> dict[str, float]:
    """Name and value of each tensor of a single value that is the same in all checkpoints."""
    return {
        name.format(layer): value
        for name, value in kind.constants.items()
        for layer in range(config.layer_count)
    }


def _rounded(value: float, like: Any) -> Any:
    """A value in the dtype of a stored tensor, a lazy slice."""
    return like[...].dtype.type(value)


def _equal(one: Any, other: Any) -> bool:
    """Whether two lazy tables are equal, compared a part at a time."""
    if one.get_shape() != other.get_shape():
        return False
    rows = one.get_shape()[0]
    parts = (slice(a, min(a + ROWS_COMPARED, rows)) for a in range(0, rows, ROWS_COMPARED))
    return all(np.array_equal(one[part], other[part]) for part in parts)


def _layer_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters by path; of stacked ones, the shape of one layer."""
    return {path: shape[1:] if stacked(path) else shape for path, shape in shapes.items()}
