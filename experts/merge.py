"""Merging: one checkpoint of several of one architecture, by the methods in `merge_methods`.

Safetensors files are read as NumPy arrays, tensor by tensor, and one file of the result is in
memory at a time, so that the memory depends neither on the number of checkpoints nor on their size.
"""

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy, where safetensors looks it up
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clustering import hub_files
from clustering.errors import UserError
from clustering.files import flush, read_json, read_object, sha256, write_json
from clustering.hub_files import INDEX, LICENCES, TEMPLATES, WEIGHTS, weight_files
from experts.merge_methods import METHODS, Inputs, MergeOptions, check_models

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


class Source(NamedTuple):
    """A checkpoint that is merged."""

    name: str
    """Name for messages and for the record."""
    directory: Path
    """Directory with one safetensors file or a sharded set."""
    origin: Path | None = None
    """Directory that it was composed from, for the record; None: it is complete itself."""


def merge(
    sources: Sequence[Source],
    out: Path | str,
    options: MergeOptions | None = None,
    *,
    weights: Sequence[float] | None = None,
    base: Source | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Writes one checkpoint, merged of Hugging Face checkpoints, into `out`, and returns `out`.

    options: None: the linear mean. weights: one for each source, as the method uses them; None: 1
    each. base: checkpoint from which differences are taken, for methods that work on differences.
    facts: further keys of merge.json.

    Floating tensors are computed in float64 and rounded once to their stored dtype. A value that is
    equal in all checkpoints keeps its bits (but for slerp, which turns whole tensors). Other
    tensors must be equal. config.json and the tokenizer are those of the first checkpoint;
    merge.json names method, parameters, sources, their hashes and weights.

    UserError if `out` has weights already, or if tensors, shapes, dtypes, configurations or
    vocabularies differ, or if the method does not take what is given.
    """
    options, out = options or MergeOptions(), Path(out)
    method = METHODS[options.method]
    weights = check_models(options, weights, len(sources))
    if method.has_base != (base is not None):
        raise UserError(f"{options.method} {'needs a' if method.has_base else 'takes no'} base")
    for there in (out / WEIGHTS, out / INDEX):
        if there.exists():
            raise UserError(f"{there} exists already; nothing is overwritten")
    # A merge.json without weights is left by an interrupted merge.
    if out.exists() and any(out.iterdir()) and not (out / RECORD).exists():
        raise UserError(f"{out} has other files in it; nothing is overwritten")
    checkpoints = _open_equal([*sources, *([base] if base else [])])
    opened = checkpoints[: len(sources)]
    # A weight of 0 leaves a model out, and with it what is not finite there.
    used = [n for n, weight in enumerate(weights) if weight != 0 or method.least > 1]
    combination = _Combination(
        models=[opened[n] for n in used],
        weights=[weights[n] for n in used],
        base=checkpoints[-1] if base else None,
        options=options,
    )
    record = {
        "format": 1,
        "method": options.method,
        "parameters": options.parameters,
        **({"base": _facts(base)} if base else {}),
        "sources": [
            {**_facts(source), "weight": weight}
            for source, weight in zip(sources, weights, strict=True)
        ],
        **(facts or {}),
    }
    _write(opened[0], combination.tensor, record, sources[0].directory, out)
    return out


def read_record(directory: Path) -> dict[str, Any]:
    """The merge.json of a merged checkpoint."""
    return read_json(directory / RECORD)


def _facts(source: Source) -> dict[str, Any]:
    directory = source.origin or source.directory
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    names = names if source.origin else weight_files(directory)
    hashes = {name: sha256(directory / name) for name in names}
    return {"name": source.name, "path": str(directory), "sha256": hashes}


def _open_equal(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """The tensors of each checkpoint; UserError unless all have the same configuration, vocabulary,
    names of tensors, shapes and dtypes."""
    names = [source.name for source in sources]
    # Equal shapes can mean different functions.
    configs = [read_object(source.directory / "config.json") for source in sources]
    configs = [{key: c[key] for key in c if key not in FREE_CONFIG_KEYS} for c in configs]
    _check_equal("checkpoints of different configurations", names, configs, in_both=True)
    vocabularies = [vocabulary(source.directory) for source in sources]
    known = [(name, v) for name, v in zip(names, vocabularies, strict=True) if v]
    if known:
        _check_equal("checkpoints of different vocabularies", *zip(*known, strict=True))
    checkpoints = [_open(source.directory) for source in sources]
    tensors = [{name: _describe(c[name].get_slice(name)) for name in c} for c in checkpoints]
    _check_equal("checkpoints that differ", names, tensors)
    return checkpoints


def vocabulary(directory: Path) -> dict[str, int]:
    """Piece -> id, of a checkpoint's tokenizer.json; empty for a checkpoint without one."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return {}
    content = read_object(path)
    try:
        pieces = content["model"]["vocab"]
        # Unigram models list pieces with scores, others map pieces to ids.
        if isinstance(pieces, list):
            pieces = {piece: number for number, (piece, _) in enumerate(pieces)}
        added = {each["content"]: each["id"] for each in content.get("added_tokens") or ()}
        return {**pieces, **added}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has no vocabulary that can be read: {error!r}") from error


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
    what: str, names: Sequence[str], tables: Sequence[dict[str, Any]], *, in_both: bool = False
) -> None:
    """Raises UserError unless the tables, one of each checkpoint, have equal values. in_both: keys
    that a table lacks do not count."""
    first, *others = tables
    faults = [
        f"{key} is {first.get(key, 'missing')} in {names[0]} "
        f"and {other.get(key, 'missing')} in {name}"
        for name, other in zip(names[1:], others, strict=True)
        for key in sorted(first.keys() & other.keys() if in_both else first.keys() | other.keys())
        if first.get(key) != other.get(key)
    ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{what} cannot be merged: {'; '.join(faults[:5])}{more}")


def _describe(tensor: Any) -> str:
    return f"{tensor.get_dtype()}{tensor.get_shape()}"


class _Tensors(Sequence[np.ndarray]):
    """One tensor of each checkpoint in float64, read whenever it is indexed."""

    def __init__(self, name: str, checkpoints: Sequence[dict[str, Any]]):
        self._name, self._checkpoints = name, checkpoints

    def __len__(self) -> int:
        return len(self._checkpoints)

    def __getitem__(self, number: Any) -> Any:
        return self._checkpoints[number][self._name].get_tensor(self._name).astype(np.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Combination:
    """Checkpoints that are merged, and how."""

    models: Sequence[dict[str, Any]]
    weights: Sequence[float]
    base: dict[str, Any] | None
    options: MergeOptions

    def tensor(self, name: str) -> np.ndarray:
        """One tensor of the result; a value that is equal in all checkpoints keeps its bits, even
        NaN or -0. UserError for integers that differ and for a result that is not finite."""
        like = self.models[0][name]
        dtype = like.get_slice(name).get_dtype()
        if dtype not in FLOATS + INTEGERS:
            raise UserError(f"{name} has the dtype {dtype}, which cannot be merged")
        first = like.get_tensor(name)
        agree = np.ones(first.shape, dtype=bool)
        for checkpoint in (*self.models[1:], *([self.base] if self.base else [])):
            agree &= _bits(checkpoint[name].get_tensor(name)) == _bits(first)
        if agree.all():
            return first
        if dtype not in FLOATS:
            raise UserError(
                f"{name} has integers that differ between checkpoints and cannot be merged"
            )
        method, base = METHODS[self.options.method], self.base
        inputs = Inputs(
            models=_Tensors(name, self.models),
            weights=self.weights,
            base=None if base is None else base[name].get_tensor(name).astype(np.float64),
            name=name,
            **self.options.parameters,
        )
        with np.errstate(invalid="ignore", over="ignore"):  # non-finite values are checked below
            made = method.combine(inputs).astype(first.dtype)
        kept = agree & method.by_entry
        if not np.isfinite(made[~kept]).all():
            raise UserError(
                f"{name} has values that are not finite in some checkpoints and cannot be merged"
            )
        return np.where(kept, first, made)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def _write(
    like: dict[str, Any],
    tensor: Callable[[str], np.ndarray],
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
            save_file({name: tensor(name) for name in names}, partial / file, {"format": "pt"})
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
