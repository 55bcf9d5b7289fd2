"""Averaging the weights of checkpoints of one architecture into one checkpoint.

Knows safetensors files as NumPy arrays, not what a model makes of them. Works slice by slice, so
that the memory it takes depends neither on the number of checkpoints nor on their size.
"""

import json
import math
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from clustering.errors import UserError
from clustering.files import replace, sha256, write_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
RECORD = "merge.json"

# Everything that transformers writes beside the weights of a language model; never code.
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
)
CODE_SUFFIXES = (".py", ".pkl", ".bin")

# Keys of config.json that may differ between checkpoints that mean the same function.
FREE_CONFIG_KEYS = (
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)

# https://huggingface.co/docs/safetensors: names of the dtypes in the header.
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
COPIES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
}
DTYPES = {name: np.dtype(dtype) for name, dtype in (FLOATS | COPIES).items()}

# Elements in one slice: with its float64 sum and temporary copies, about 60 MB.
SLICE_ELEMENTS = 1 << 21


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tensor:
    """What the header of a safetensors file says of one tensor."""

    dtype: str
    """As safetensors spells it, such as 'BF16'."""
    shape: tuple[int, ...]


def average(
    paths: Sequence[Path | str], *, out: Path | str, weights: Sequence[float] | None = None
) -> Path:
    """Write the weighted average of Hugging Face checkpoints into `out`, and return `out`.

    `paths` are directories, with one safetensors file or a sharded set; `weights` are not negative
    and are scaled to sum 1, None standing for equal ones. Floating tensors are averaged in float64
    and rounded once to their stored dtype; where all checkpoints agree in a value, its bits are
    kept. Other tensors must agree. config.json and the tokenizer are those of the first checkpoint;
    merge.json names the sources, their hashes and weights.

    UserError if `out` has weights already, or if tensors, shapes, dtypes, or configurations differ.
    """
    directories = [Path(path) for path in paths]
    shares = _shares(weights, len(directories))
    out = Path(out)
    for there in (out / WEIGHTS, out / INDEX):
        if there.exists():
            raise UserError(f"{there} is there already; nothing is overwritten")
    # With merge.json and no weights, it is of a merge that was interrupted.
    if out.exists() and any(out.iterdir()) and not (out / RECORD).exists():
        raise UserError(f"{out} has other files in it; nothing is overwritten")
    _check_configs(directories)
    with ExitStack() as stack:
        checkpoints = [_Checkpoint(directory, stack) for directory in directories]
        _check_tensors(checkpoints)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RECORD, _record(checkpoints, shares))
        _copy_side_files(directories[0], out)
        _write_average(checkpoints, shares, out)
    return out


class _Checkpoint:
    """The tensors of one checkpoint directory, read in slices. Open until `stack` closes."""

    def __init__(self, directory: Path, stack: ExitStack):
        self.directory = directory
        self.files = _weight_files(directory)
        self.tensors: dict[str, _Tensor] = {}
        self._slices: dict[str, Any] = {}
        for file in self.files:
            try:
                opened = stack.enter_context(safe_open(file, framework="np"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} cannot be read as safetensors: {error}") from error
            for name in opened.keys():  # noqa: SIM118 - not a dict, and not iterable
                view = opened.get_slice(name)
                self._slices[name] = view
                self.tensors[name] = _Tensor(dtype=view.get_dtype(), shape=tuple(view.get_shape()))

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Those rows of a tensor; a scalar counts as one row."""
        return np.atleast_1d(self._slices[name][rows if self.tensors[name].shape else ...])


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if count == 0:
        raise UserError("there is no checkpoint to average")
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise UserError(
            f"there should be one weight for each of {count} checkpoints; got {len(weights)}"
        )
    total = math.fsum(weights)
    if not all(weight >= 0 and math.isfinite(weight) for weight in weights) or total == 0:
        raise UserError(
            f"weights must not be negative nor all zero; got {', '.join(map(str, weights))}"
        )
    return [weight / total for weight in weights]


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not (directory / INDEX).is_file():
        raise UserError(f"{directory} has no {WEIGHTS}")
    weight_map = _json(directory / INDEX).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{directory / INDEX} names no files, or files elsewhere")
    return [directory / name for name in sorted(set(names))]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold an object")
    return value


def _check_configs(directories: list[Path]) -> None:
    """Raise UserError where configurations differ: equal shapes can mean different functions."""
    first = _json(directories[0] / "config.json")
    faults = []
    for directory in directories[1:]:
        other = _json(directory / "config.json")
        for key in sorted((first.keys() & other.keys()) - set(FREE_CONFIG_KEYS)):
            if first[key] != other[key]:
                faults.append(
                    f"{key} is {first[key]!r} in {directories[0]} and {other[key]!r} in {directory}"
                )
    _raise_first_five("checkpoints of different configurations cannot be averaged", faults)


def _check_tensors(checkpoints: list[_Checkpoint]) -> None:
    first = checkpoints[0]
    faults = [
        f"{name} has the dtype {tensor.dtype}, which cannot be averaged"
        for name, tensor in sorted(first.tensors.items())
        if tensor.dtype not in DTYPES
    ]
    for other in checkpoints[1:]:
        for name in sorted(first.tensors.keys() | other.tensors.keys()):
            wanted, came = first.tensors.get(name), other.tensors.get(name)
            if wanted != came:
                faults.append(
                    f"{name} is {_describe(wanted)} in {first.directory} "
                    f"and {_describe(came)} in {other.directory}"
                )
    _raise_first_five("checkpoints that differ cannot be averaged", faults)


def _describe(tensor: _Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"


def _raise_first_five(what: str, faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{what}: {'; '.join(faults[:5])}{more}")


def _copy_side_files(source: Path, out: Path) -> None:
    for file in sorted({file for pattern in COPIED for file in source.glob(pattern)}):
        if file.is_file() and file.suffix not in CODE_SUFFIXES:
            shutil.copyfile(file, out / file.name)


def _record(checkpoints: list[_Checkpoint], shares: list[float]) -> dict[str, Any]:
    sources = [
        {
            "path": str(checkpoint.directory),
            "weight": share,
            "sha256": {file.name: sha256(file) for file in checkpoint.files},
        }
        for checkpoint, share in zip(checkpoints, shares, strict=True)
    ]
    return {"format": 1, "sources": sources}


def _write_average(checkpoints: list[_Checkpoint], shares: list[float], out: Path) -> None:
    """Write the weights last and whole: a directory with model.safetensors in it is complete."""
    weighted = [(c, share) for c, share in zip(checkpoints, shares, strict=True) if share > 0]
    tensors = checkpoints[0].tensors
    # As the safetensors library orders them: wide dtypes first, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].dtype].itemsize, name))
    for left_by_a_crash in out.glob(f".{WEIGHTS}.*.tmp"):
        left_by_a_crash.unlink()

    def write(file: BinaryIO) -> None:
        _write_header(file, {name: tensors[name] for name in names})
        for name in names:
            for rows in _row_slices(tensors[name]):
                file.write(_mean(name, rows, weighted).tobytes())

    replace(out / WEIGHTS, write)


def _write_header(file: BinaryIO, tensors: dict[str, _Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def _row_slices(tensor: _Tensor) -> Iterator[slice]:
    if 0 in tensor.shape:
        return
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, SLICE_ELEMENTS // math.prod(tensor.shape[1:]))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _mean(name: str, rows: slice, weighted: list[tuple[_Checkpoint, float]]) -> np.ndarray:
    """The average of some rows of a tensor; a value that all share keeps its bits, NaN or -0."""
    first = weighted[0][0].read(name, rows)
    agree = np.ones(first.shape, dtype=bool)
    total = np.zeros(first.shape, dtype=np.float64)
    floating = weighted[0][0].tensors[name].dtype in FLOATS
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is looked for below
        for checkpoint, share in weighted:
            part = checkpoint.read(name, rows)
            agree &= _bits(part) == _bits(first)
            if floating:
                total += share * part.astype(np.float64)
        if agree.all():
            return first
        if not floating:
            raise UserError(
                f"{name} holds whole numbers that differ between checkpoints, which have no average"
            )
        mean = np.where(agree, first, total.astype(first.dtype))
    if not np.isfinite(mean[~agree]).all():
        raise UserError(
            f"{name} has values that are not finite in some checkpoints, so it has no average"
        )
    return mean


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")
