"""The tensors of a checkpoint directory as they are stored, read a part at a time. A directory
with `base.json` stores only what differs from another one, its base: tensors of its own in place of
the base's, and products of thin matrices that are added, of an adapter or of `low_rank`. The chain
of bases is followed here, and only here: whoever opens a checkpoint directory reads a complete
model."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from clustering.errors import UserError
from clustering.files import read_json, sha256, write_json
from clustering.hub_files import INDEX, WEIGHTS, weight_files
from xelm.models.families.family import Family
from xelm.models.low_rank import LOW_RANK, read_low_rank
from xelm.models.peft import ADAPTER_FILES, CONFIG, FACTORS, Product, read_products

BASE = "base.json"
FORMAT = 1
POINTER = b"version https://git-lfs"
"""Beginning of a file that git-lfs has not fetched."""


def base_of(directory: str | Path) -> Path | None:
    """The directory that this one stores the differences from; None for a complete checkpoint."""
    path = Path(directory) / BASE
    if not path.is_file():
        return None
    found = Path(os.path.normpath(Path(directory).absolute() / _record(path)["base"]))
    if not found.is_dir():
        raise UserError(f"{path} names a base that is not there: {found}")
    return found


def chain(directory: str | Path) -> list[Path]:
    """The directory, its base, the base of that, and so on to a complete checkpoint."""
    found, base = [Path(directory)], base_of(directory)
    while base is not None:
        if base in found[1:] or base == Path(directory).absolute():
            raise UserError(f"{directory} is its own base: {BASE} of {found[-1]} names {base}")
        found.append(base)
        base = base_of(base)
    return found


def root(directory: str | Path) -> Path:
    """The complete checkpoint at the end of the chain of bases."""
    return chain(directory)[-1]


def own_weight_files(directory: str | Path) -> list[str]:
    """Names of the files of weights in a directory itself: of a complete checkpoint, or the tensors
    and the adapter that differ from its base."""
    directory = Path(directory)
    if not (directory / BASE).is_file():
        return weight_files(directory)
    whole = (directory / WEIGHTS).is_file() or (directory / INDEX).is_file()
    added = [name for name in (*ADAPTER_FILES, LOW_RANK) if (directory / name).is_file()]
    return [*(weight_files(directory) if whole else ()), *added]


def stored_as(directory: str | Path) -> str | None:
    """What a directory has: "adapter", or "difference", to be composed with its base; None: a
    complete checkpoint."""
    if not (Path(directory) / BASE).is_file():
        return None
    names = own_weight_files(directory)
    return "adapter" if set(names) == set(ADAPTER_FILES) else "difference"


def write_base(
    directory: Path, place: Path, base: str | Path, hashes: Mapping[str, str] | None = None
) -> None:
    """Writes `base.json` into a directory that will be moved to `place`. hashes: SHA-256 of the
    base's own weight files; None computes them."""
    base = Path(base)
    if hashes is None:
        hashes = base_hashes(base)
    relative = os.path.relpath(base.absolute(), place.absolute())
    record = {"format": FORMAT, "base": Path(relative).as_posix(), "sha256": dict(hashes)}
    write_json(directory / BASE, record)


def base_hashes(base: Path) -> dict[str, str]:
    """File -> SHA-256 of all that decides the weights of a base: its files of weights and, if it
    has a base itself, its `base.json`."""
    names = own_weight_files(base) + ([BASE] if (base / BASE).is_file() else [])
    return {name: sha256(base / name) for name in names}


def recorded_base_hashes(directory: str | Path) -> dict[str, str]:
    """File -> SHA-256 of the base that a directory was made on, as its `base.json` says."""
    return dict(_record(Path(directory) / BASE)["sha256"])


def open_tensors(directory: str | Path, kind: Family) -> dict[str, Any]:
    """Lazy slices of the tensors of a checkpoint directory by their names in the family's table,
    with the methods of those of safetensors: get_shape, get_dtype, and indexing by slices."""
    tensors: dict[str, Any] = {}
    for folder in reversed(chain(directory)):
        based = bool(tensors)
        tensors |= replaced_by(folder, kind, based=based)
        if (folder / LOW_RANK).is_file():
            tensors |= _added(folder, tensors)
        if (folder / CONFIG).is_file() and based:
            tensors |= _adapted(folder, kind, tensors)
    return tensors


def replaced_by(folder: Path, kind: Family, *, based: bool = True) -> dict[str, Any]:
    """Lazy slices of the whole tensors in a directory itself, by their names in the family's table.
    based: whether it has a base."""
    files = [name for name in own_weight_files(folder) if name not in (*ADAPTER_FILES, LOW_RANK)]
    if not files:
        return {}
    stored = _open(folder, files)
    # Of tensors that differ from a base's, perhaps none has the prefix.
    prefixed = based or any(name.startswith(kind.prefix) for name in stored)
    return {kind.name(name, prefixed): value for name, value in stored.items()}


def _added(folder: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors to which a directory adds low-rank products, changed."""
    found = {}
    for name, product in read_low_rank(folder).items():
        shape = (len(product.b), product.a.shape[1])
        if name not in tensors or tuple(tensors[name].get_shape()) != shape:
            raise UserError(f"{folder / LOW_RANK} changes {name} by {shape}, unlike its base's")
        found[name] = _Sum.of(tensors[name], product)
    return found


def _adapted(folder: Path, kind: Family, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors that an adapter changes, changed."""
    found: dict[str, Any] = {}
    rows = {_row(name): tensor for name, tensor in kind.tensors.items()}
    for module, product in read_products(folder, kind).items():
        name = f"{module}.weight"
        if name not in tensors:
            raise UserError(f"{folder / FACTORS} changes {module}, which its base does not have")
        tensor = rows.get(_row(name))
        inputs_first = tensor is not None and tensor.inputs_first
        shape = (product.b.shape[0], product.a.shape[1])
        wanted = tuple(tensors[name].get_shape())
        if wanted != (shape[::-1] if inputs_first else shape):
            raise UserError(
                f"{folder / FACTORS} changes {module} by a matrix of {shape}; that of its base "
                f"has {wanted}"
            )
        if inputs_first:
            product = Product(product.b.T, product.a.T, product.scale)
        found[name] = _Sum.of(tensors[name], product)
    return found


def _row(name: str) -> str:
    return ".".join("{}" if part.isdigit() else part for part in name.split("."))


@dataclass(frozen=True, slots=True)
class _Sum:
    """A stored tensor [rows, columns] plus products, summed in float64 and rounded once."""

    stored: Any
    products: tuple[Product, ...]
    """Oriented as the tensor is: b [rows, rank], a [rank, columns]."""

    @classmethod
    def of(cls, tensor: Any, product: Product) -> "_Sum":
        """The sum of a lazy slice, which may be a sum itself, and one more product."""
        if isinstance(tensor, _Sum):
            return _Sum(tensor.stored, (*tensor.products, product))
        return _Sum(tensor, (product,))

    def get_shape(self) -> list[int]:
        """Its shape."""
        return self.stored.get_shape()

    def get_dtype(self) -> str:
        """Dtype of the stored tensor, as safetensors calls it; values are float32."""
        return self.stored.get_dtype()

    def __getitem__(self, part: slice | Sequence[slice]) -> np.ndarray:
        rows, columns = (part, slice(None)) if isinstance(part, slice) else part
        values = np.asarray(self.stored[rows, columns]).astype(np.float64)
        for a, b, scale in self.products:
            values += scale * (b[rows].astype(np.float64) @ a[:, columns].astype(np.float64))
        return values.astype(np.float32)


def _record(path: Path) -> dict[str, Any]:
    found = read_json(path, newest_format=FORMAT)
    if not isinstance(found.get("base"), str) or not isinstance(found.get("sha256"), dict):
        raise UserError(f"{path} must name a base and the hashes of its files")
    return found


def _open(directory: str | Path, names: Sequence[str]) -> dict[str, Any]:
    """Lazy slices of tensors by name, from these files of a directory."""
    readers = {}
    for name in names:
        path = Path(directory) / name
        if not path.is_file():
            raise UserError(f"{Path(directory) / INDEX} names {name}, which is missing")
        try:
            with path.open("rb") as start:
                fetched = start.read(len(POINTER)) != POINTER
            file = safe_open(path, framework="np") if fetched else None
        except Exception as error:
            raise UserError(f"{path} is not readable as safetensors: {error}") from error
        if file is None:
            raise UserError(f"{path} is a pointer of git-lfs: fetch the weights, git lfs pull")
        for key in file.keys():  # noqa: SIM118 (not a dictionary)
            readers[key] = file.get_slice(key)
    return readers
