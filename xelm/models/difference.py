"""What a checkpoint differs in from another one, its base: written as a directory that stores no
more than that (`xelm.models.stored` reads it)."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clustering.hub_files import LICENCES
from xelm.models.checkpoint import all_or_nothing, family_of, read_config
from xelm.models.companions import companions
from xelm.models.low_rank import truncated, write_low_rank
from xelm.models.peft import Product
from xelm.models.stored import open_tensors, root, write_base
from xelm.models.tensor_file import TensorKind, write_tensors
from xelm.models.weights import ROWS_COMPARED, whole_tensor

LEAST_SAVED = 0.1
"""Share of a checkpoint's bytes from which on it is stored as a difference. A complete checkpoint
is loaded by other programs, which is worth more than a few equal vectors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A checkpoint as what it differs in from a base."""

    base: Path
    tensors: Mapping[str, Callable[[], np.ndarray]]
    """Name in the family's table -> function that reads a tensor that replaces the base's."""
    products: Mapping[str, Product] = field(default_factory=dict)
    """Name -> product that is added to the base's tensor, oriented as that is."""
    kinds: Mapping[str, TensorKind] = field(default_factory=dict)
    """Name -> dtype and shape of each tensor in `tensors`."""
    saved: float = 0.0
    """Share of the bytes of a complete checkpoint that is not stored."""


def difference(directory: str | Path, base: str | Path) -> Difference | None:
    """The tensors of a checkpoint that are not those of another one bit for bit; None where the two
    have different tensors. They are compared a part at a time."""
    kind = family_of(directory)
    if read_config(base) != read_config(directory):
        return None
    own, others = open_tensors(directory, kind), open_tensors(base, kind)
    if own.keys() != others.keys():
        return None
    kinds = {name: TensorKind.stored(value) for name, value in own.items()}
    other = [name for name in own if not _same_bits(own[name], others[name])]
    total = sum(kind.size for kind in kinds.values())
    return Difference(
        base=Path(base),
        tensors={name: _reader(own[name]) for name in other},
        kinds={name: kinds[name] for name in other},
        saved=1 - sum(kinds[name].size for name in other) / total,
    )


def reverted(directory: str | Path, base: str | Path, layers: Sequence[int]) -> Difference:
    """A checkpoint with some layers set back to those of its base (Ahuja and Blevins 2026, arXiv
    2606.00284). layers: their numbers, from 0."""
    found = difference(directory, base)
    assert found is not None  # models of one RUN
    rows = [name for name in family_of(directory).tensors if "{}" in name]
    names = {name.format(layer) for name in rows for layer in layers}
    kept = {name: read for name, read in found.tensors.items() if name not in names}
    return Difference(base=found.base, tensors=kept, kinds={n: found.kinds[n] for n in kept})


def compressed(
    found: Difference, directory: str | Path, *, rank: int | None, energy: float | None
) -> Difference:
    """A difference whose matrices are products of a low rank, `truncated`, where that is smaller
    than the matrix; vectors stay as they are. directory: the checkpoint."""
    kind = family_of(directory)
    base, products, tensors = open_tensors(found.base, kind), {}, {}
    for name, read in found.tensors.items():
        own = read()
        if own.ndim == 2:
            change = own.astype(np.float64) - base[name][:].astype(np.float64)
            product = truncated(change, rank=rank, energy=energy)
            if len(product.a) * sum(own.shape) < own.size:
                products[name] = product
                continue
        tensors[name] = read
    return Difference(
        base=found.base,
        tensors=tensors,
        products=products,
        kinds={name: found.kinds[name] for name in tensors},
    )


def write_difference(
    directory: Path, found: Difference, dtype: str, *, extra: Sequence[Path] = ()
) -> None:
    """Writes a difference as the new directory `directory`, all of it or nothing: base.json, the
    tensors that replace those of the base, factors in a dtype, terms of use, and the files in
    `extra`."""
    with all_or_nothing(directory) as partial:
        write_base(partial, directory, found.base)
        if found.tensors:
            kinds = {name: found.kinds[name] for name in found.tensors}
            write_tensors(partial, kinds, (read() for read in found.tensors.values()))
        if found.products:
            write_low_rank(partial, found.products, dtype, partial / "base.json")
        whole = root(found.base)
        for name in companions(whole):
            if name.lower().startswith(LICENCES):
                shutil.copyfile(whole / name, partial / name)
        for path in extra:
            shutil.copyfile(path, partial / path.name)


def store(whole: Path, base: str | Path, directory: Path, *, extra: Sequence[Path] = ()) -> None:
    """Moves a complete checkpoint to the new directory `directory` or, where that saves at least
    `LEAST_SAVED` of its bytes, writes what it differs in from its base there, with the files in
    `extra`, which the checkpoint has already."""
    found = difference(whole, base)
    if found is not None and found.saved >= LEAST_SAVED:
        write_difference(directory, found, "float32", extra=extra)
        shutil.rmtree(whole)
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    whole.rename(directory)


def _reader(stored: Any) -> Callable[[], np.ndarray]:
    return lambda: whole_tensor(stored)


def _same_bits(one: Any, other: Any) -> bool:
    """Whether two lazy tensors have the same values to the last bit, compared a part at a time."""
    if list(one.get_shape()) != list(other.get_shape()) or one.get_dtype() != other.get_dtype():
        return False
    if not one.get_shape():
        return _bits(one[...]) == _bits(other[...])
    rows = one.get_shape()[0]
    parts = (slice(a, min(a + ROWS_COMPARED, rows)) for a in range(0, rows, ROWS_COMPARED))
    return all(_bits(one[part]) == _bits(other[part]) for part in parts)


def _bits(array: np.ndarray) -> tuple[str, bytes]:
    return array.dtype.str, np.ascontiguousarray(array).tobytes()
