"""Merging: the average of the weights of checkpoints of one architecture.

Safetensors files are read as NumPy arrays, tensor by tensor, and one file of the result is in
memory at a time, so that the memory depends neither on the number of checkpoints nor on their size.
"""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy, where safetensors looks it up
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clustering import hub_files
from clustering.errors import UserError
from clustering.files import flush, read_object, sha256, write_json
from clustering.hub_files import INDEX, LICENCES, TEMPLATES, WEIGHTS, weight_files

RECORD = "merge.json"

# Configuration and tokenizer are text or SentencePiece; files that can run code end otherwise.
COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt")

# Keys of config.json that may differ between checkpoints that mean the same function.
FREE_CONFIG_KEYS = frozenset(
    ["_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"]
)

# Names of dtypes in safetensors; it does not read other floats into NumPy.
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


def average(
    paths: Sequence[Path | str], *, out: Path | str, weights: Sequence[float] | None = None
) -> Path:
    """Writes the weighted average of Hugging Face checkpoints into `out`, and returns `out`.

    `paths` are directories, with one safetensors file or a sharded set; `weights` are not negative
    and are scaled to sum 1, and None means equal ones. Floating tensors are averaged in float64 and
    rounded once to their stored dtype; a value that is equal in all checkpoints keeps its bits.
    Other tensors must be equal. config.json and the tokenizer are those of the first checkpoint;
    merge.json names the sources, their hashes and weights.

    UserError if `out` has weights already, or if tensors, shapes, dtypes, or configurations differ.
    """
    directories = [Path(path) for path in paths]
    shares = _shares(weights, len(directories))
    out = Path(out)
    for there in (out / WEIGHTS, out / INDEX):
        if there.exists():
            raise UserError(f"{there} exists already; nothing is overwritten")
    # A merge.json without weights is left by an interrupted merge.
    if out.exists() and any(out.iterdir()) and not (out / RECORD).exists():
        raise UserError(f"{out} has other files in it; nothing is overwritten")
    # Equal shapes can mean different functions.
    configs = [read_object(directory / "config.json") for directory in directories]
    configs = [{key: c[key] for key in c if key not in FREE_CONFIG_KEYS} for c in configs]
    _check_equal("checkpoints of different configurations", directories, configs, in_both=True)
    checkpoints = [_open(directory) for directory in directories]
    tensors = [{name: _describe(c[name].get_slice(name)) for name in c} for c in checkpoints]
    _check_equal("checkpoints that differ", directories, tensors)
    weighted = [(c, share) for c, share in zip(checkpoints, shares, strict=True) if share > 0]
    sources = [
        {
            "path": str(directory),
            "weight": share,
            "sha256": {name: sha256(directory / name) for name in weight_files(directory)},
        }
        for directory, share in zip(directories, shares, strict=True)
    ]
    record = {"format": 1, "sources": sources}
    _write(checkpoints[0], lambda name: _mean(name, weighted), record, directories[0], out)
    return out


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if count == 0:
        raise UserError("there is no checkpoint to average")
    weights = [1] * count if weights is None else weights
    if len(weights) != count:
        raise UserError(
            f"there should be one weight for each of {count} checkpoints; got {len(weights)}"
        )
    if not (all(weight >= 0 for weight in weights) and 0 < sum(weights) < math.inf):
        raise UserError(
            f"weights must not be negative nor all zero; got {', '.join(map(str, weights))}"
        )
    return [weight / math.fsum(weights) for weight in weights]


def _open(directory: Path) -> dict[str, Any]:
    """Tensor name -> the open file that has it: the only one, or a shard."""
    files = {}
    for path in (directory / name for name in weight_files(directory)):
        try:
            file = safe_open(path, framework="np")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as safetensors: {error}") from error
        files |= dict.fromkeys(file.keys(), file)
    return files


def _check_equal(
    what: str, directories: list[Path], tables: list[dict[str, Any]], *, in_both: bool = False
) -> None:
    """Raises UserError unless the tables, one of each directory, have equal values. in_both: keys
    that a table lacks do not count."""
    first, *others = tables
    faults = [
        f"{name} is {first.get(name, 'missing')} in {directories[0]} "
        f"and {other.get(name, 'missing')} in {directory}"
        for directory, other in zip(directories[1:], others, strict=True)
        for name in sorted(first.keys() & other.keys() if in_both else first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{what} cannot be averaged: {'; '.join(faults[:5])}{more}")


def _describe(tensor: Any) -> str:
    return f"{tensor.get_dtype()}{tensor.get_shape()}"


def _mean(name: str, weighted: list[tuple[dict[str, Any], float]]) -> np.ndarray:
    """The average of a tensor; a value that is equal in all keeps its bits, even NaN or -0."""
    like = weighted[0][0][name]
    dtype = like.get_slice(name).get_dtype()
    if dtype not in FLOATS + INTEGERS:
        raise UserError(f"{name} has the dtype {dtype}, which cannot be averaged")
    first = like.get_tensor(name)
    agree = np.ones(first.shape, dtype=bool)
    total = np.zeros(first.shape, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # non-finite values are checked below
        for checkpoint, share in weighted:
            part = checkpoint[name].get_tensor(name)
            agree &= _bits(part) == _bits(first)
            if dtype in FLOATS:
                total += share * part.astype(np.float64)
        if agree.all():
            return first
        if dtype not in FLOATS:
            raise UserError(
                f"{name} has integers that differ between checkpoints and cannot be averaged"
            )
        mean = np.where(agree, first, total.astype(first.dtype))
    if not np.isfinite(mean[~agree]).all():
        raise UserError(
            f"{name} has values that are not finite in some checkpoints and cannot be averaged"
        )
    return mean


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def _write(
    like: dict[str, Any],
    mean: Callable[[str], np.ndarray],
    record: dict[str, Any],
    directory: Path,
    out: Path,
) -> None:
    """Writes the weights next to `out` and moves them there last, so that a directory with
    model.safetensors, or the index of several files, is complete. `like`, read from `directory`,
    has the names and sizes of tensors."""
    sizes = {name: _bytes(file.get_slice(name)) for name, file in like.items()}
    files = hub_files.split_weights(sizes)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a crash
    try:
        partial.mkdir(parents=True)
        for file, names in files.items():
            save_file({name: mean(name) for name in names}, partial / file, {"format": "pt"})
            # The library makes files that only their owner can read, whatever the umask.
            shutil.copymode(directory / "config.json", partial / file)
        if len(files) > 1:
            hub_files.write_index(partial, files, sum(sizes.values()))
        flush(partial)
        write_json(out / RECORD, record)
        _copy_companions(directory, out)
        flush(out)
        for file in [*files, *([INDEX] if len(files) > 1 else [])]:
            os.replace(partial / file, out / file)
        flush(out)  # so that the new names survive a power cut
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{out / WEIGHTS} was not written: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_companions(directory: Path, out: Path) -> None:
    for file in directory.iterdir():
        terms = file.is_file() and file.name.lower().startswith(LICENCES)
        if terms or (file.suffix in COPIED_SUFFIXES and file.name not in (INDEX, RECORD)):
            shutil.copyfile(file, out / file.name)
    for file in (directory / TEMPLATES).glob("*.jinja"):
        (out / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, out / TEMPLATES / file.name)


def _bytes(tensor: Any) -> int:
    dtype = tensor.get_dtype()
    width = 1 if dtype == "BOOL" else int(dtype.lstrip("BFIU").partition("_")[0]) // 8
    return math.prod(tensor.get_shape()) * width
