"""Distances between languages inside a model: by its hidden states, by its updates in training, and
by the losses of experts.

`xelm features` writes the files that are read here; nothing here runs a model.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
from jaxtyping import Float

from clustering import files
from clustering.distances import Distances
from clustering.errors import UserError
from clustering.languages import canonical_all

Kind = TypeVar("Kind", bound="_Measurements")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Measurements:
    """What was measured inside a model for several languages, saved as one .npz file."""

    array: ClassVar[str]
    """Name of the values in the file."""
    dimensions: ClassVar[str]
    """Names of the dimensions of the values."""
    languages: tuple[str, ...]
    """Canonical tags."""
    values: np.ndarray
    made_from: dict[str, str]
    """Name of an input -> its SHA-256."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one .npz file, atomically."""
        texts = {"languages": self.languages, "made_from": self.made_from}
        texts["hashes"] = self.made_from.values()
        arrays = {name: np.array(list(values), str) for name, values in texts.items()}
        files.write_arrays(path, {**arrays, self.array: self.values})

    @classmethod
    def load(cls: type[Kind], path: str | os.PathLike[str]) -> Kind:
        """The value of a file that `save` wrote; UserError for something else."""
        arrays, axes = files.read_arrays(path), cls.dimensions.split()
        tags, values = arrays.get("languages"), arrays.get(cls.array)
        if (
            tags is None
            or values is None
            or values.ndim != len(axes)
            or any(n != len(tags) for n, axis in zip(values.shape, axes) if axis == "languages")
        ):
            raise UserError(
                f"{path} must have arrays 'languages' and {cls.array!r} [{', '.join(axes)}], as "
                "those of xelm features"
            )
        named = (arrays.get(part, np.array([], str)).tolist() for part in ("made_from", "hashes"))
        tags = canonical_all(tags.tolist())
        return cls(languages=tags, values=values, made_from=dict(zip(*named)))

    def origin(self, path: str | os.PathLike[str]) -> dict[str, str]:
        """What distances by this value are made from: its file and what that was made from."""
        return {Path(path).name: files.sha256(path), **self.made_from}


class States(_Measurements):
    """Hidden states of documents in several languages: the mean over the tokens of each document
    after each layer, [languages, documents, layers, D]. In parallel text, documents with the same
    number are translations of each other."""

    __slots__ = ()
    array, dimensions = "states", "languages documents layers D"


class Updates(_Measurements):
    """Updates of a model (new weights less old) by a few steps of training on each language alone:
    their inner products in each layer, [layers, languages, languages] (Li et al. 2025, Group then
    Scale, arXiv 2506.12388)."""

    __slots__ = ()
    array, dimensions = "updates", "layers languages languages"


def cosine(
    path: str | os.PathLike[str], languages: Sequence[str] | None = None, layer: int | None = None
) -> Distances:
    """Distances (1 - cos) / 2, 0..1, of the languages' mean states less the mean of all languages.

    What the states have in common would hide the differences. layer: 1 to the number of layers;
    None takes the middle one, where states depend least on single words. Languages that are not in
    the file are at an unknown distance. UserError for a layer that is not there, and if none of the
    languages is."""

    def apart(values: np.ndarray) -> np.ndarray:
        means = values.mean(axis=1, dtype=np.float64)
        means -= means.mean(axis=0)
        return (1.0 - _cosines(means @ means.T)) / 2

    return _between_states("states", path, languages, layer, apart)


def alignment(
    path: str | os.PathLike[str], languages: Sequence[str] | None = None, layer: int | None = None
) -> Distances:
    """Distances 1 - linear CKA (Kornblith et al. 2019, arXiv 1905.00414), 0..1, of the states of
    parallel documents.

    They are 0 where the states of two languages differ by rotation and scale alone. Arguments and
    errors as in `cosine`; UserError for fewer than three documents."""

    def apart(values: np.ndarray) -> np.ndarray:
        if values.shape[1] < 3:
            raise UserError(f"{path} must have 3 documents of each language; got {values.shape[1]}")
        centred = values - values.mean(axis=1, keepdims=True, dtype=np.float64)
        # In [documents, documents], which is smaller than [D, D] in large models.
        inner = centred @ centred.swapaxes(1, 2)
        flat = inner.reshape(len(inner), -1)
        return 1.0 - _cosines(flat @ flat.T)

    return _between_states("alignment", path, languages, layer, apart)


def updates(
    path: str | os.PathLike[str], languages: Sequence[str] | None = None, layer: int | None = None
) -> Distances:
    """Distances (1 - cos) / 2, 0..1, of the languages' updates of the feed-forward weights.

    Group then Scale has 1 - cos. layer: 1 to the number of layers; None takes the last three, as in
    that paper's code. Languages and errors as in `cosine`."""
    found = Updates.load(path)
    tags, index = _chosen(found.languages, path, languages)
    count = len(found.values)
    last = count if layer is None else _layer(layer, count, path)
    first = max(1, count - 2) if layer is None else last
    inner = found.values[first - 1 : last].sum(axis=0)[np.ix_(index, index)]
    measured = _measured("updates", tags, (1.0 - _cosines(inner)) / 2, found.origin(path))
    return replace(measured, parameters={"layers": [first, last]}).spread(languages or tags)


def losses(
    languages: Sequence[str],
    nats: Float[np.ndarray, "languages languages"],
    made_from: Mapping[str, str],
) -> Distances:
    """Share of the loss that a language's own expert saves compared with the other language's,
    0..1, mean of both directions; 0 where the other expert is no worse.

    nats: loss of the expert of the row's language on text of the column's; NaN if unknown."""
    with np.errstate(divide="ignore", invalid="ignore"):
        saved = np.maximum(1.0 - np.diagonal(nats) / nats, 0.0)
    return _measured("losses", canonical_all(languages), saved, made_from)


def _between_states(
    measure: str,
    path: str | os.PathLike[str],
    languages: Sequence[str] | None,
    layer: int | None,
    apart: Callable[[np.ndarray], np.ndarray],
) -> Distances:
    """Distances by a function of the states after one layer, [languages, documents, D]."""
    states = States.load(path)
    tags, index = _chosen(states.languages, path, languages)
    _, documents, layers, _ = states.values.shape
    number = -(-layers // 2) if layer is None else _layer(layer, layers, path)
    values = apart(states.values[index, :, number - 1])
    measured = _measured(measure, tags, values, states.origin(path))
    facts = {"layer": number, "documents": documents}
    return replace(measured, parameters=facts).spread(languages or tags)


def _chosen(
    known: tuple[str, ...], path: str | os.PathLike[str], languages: Sequence[str] | None
) -> tuple[tuple[str, ...], list[int]]:
    """Those of the languages that are known, and their positions; UserError if there are none."""
    wanted = known if languages is None else canonical_all(languages)
    tags = tuple(tag for tag in wanted if tag in known)
    if not tags:
        raise UserError(f"{path} knows nothing of {', '.join(wanted[:5])}")
    return tags, [known.index(tag) for tag in tags]


def _layer(number: int, count: int, path: str | os.PathLike[str]) -> int:
    if not 1 <= number <= count:
        raise UserError(f"layer must be between 1 and {count}, the layers of {path}; got {number}")
    return number


def _cosines(inner: np.ndarray) -> np.ndarray:
    """Cosines from inner products; NaN for a vector of zeros."""
    lengths = np.sqrt(np.diagonal(inner))
    with np.errstate(invalid="ignore"):
        return inner / np.outer(lengths, lengths)


def _measured(
    measure: str, tags: tuple[str, ...], values: np.ndarray, made_from: Mapping[str, str]
) -> Distances:
    values = np.clip((values + values.T) / 2, 0.0, 1.0)
    np.fill_diagonal(values, 0.0)
    known = (~np.isnan(values)).astype(float)
    return Distances(
        measure=measure, languages=tags, values=values, coverage=known, made_from=dict(made_from)
    )
