"""How near languages are to each other inside a model: by its states, by how it moves in training,
and by what an expert of one loses on another.

Knows the files and the distances. Does not know models: `xelm features` writes the files.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from clustering import files
from clustering.distances import Distances
from clustering.errors import UserError
from clustering.languages import canonical_all


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class States:
    """Of documents in several languages, layer by layer."""

    languages: tuple[str, ...]
    """Canonical tags."""
    values: Float[np.ndarray, "languages documents layers D"]
    """Mean over the tokens of each document. Documents of one number mean the same, if the text is
    parallel."""
    made_from: dict[str, str]
    """Name of an input -> its SHA-256."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one .npz."""
        _save(path, "states", self.languages, self.values, self.made_from)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "States":
        """From what `save` wrote; UserError for something else."""
        tags, values, made_from = _load(path, "states", "languages documents layers D")
        return cls(languages=tags, values=values, made_from=made_from)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Updates:
    """How a few steps of training on each language alone move a model (Li et al. 2025, Group then
    Scale, arXiv 2506.12388)."""

    languages: tuple[str, ...]
    """Canonical tags."""
    inner: Float[np.ndarray, "layers languages languages"]
    """Inner products of the languages' updates, new weights less old, of each layer."""
    made_from: dict[str, str]
    """Name of an input -> its SHA-256."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one .npz."""
        _save(path, "updates", self.languages, self.inner, self.made_from)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Updates":
        """From what `save` wrote; UserError for something else."""
        tags, inner, made_from = _load(path, "updates", "layers languages languages")
        return cls(languages=tags, inner=inner, made_from=made_from)


def cosine(
    path: str | os.PathLike[str], languages: Sequence[str] | None = None, layer: int | None = None
) -> Distances:
    """(1 - cos) / 2 of the languages' mean states, 0..1, once the mean over all languages is taken
    away: what they have in common says nothing about who is near whom, and hides it.

    layer: 1 to the number of layers; None takes the middle one, where states are least bound to
    words. Languages that the file does not have are at an unknown distance. UserError for a layer
    that it does not have, and if it has none of the languages.
    """
    states = States.load(path)
    tags, number, values = _of_layer(states, path, languages, layer)
    means = values.mean(axis=1, dtype=np.float64)
    means -= means.mean(axis=0)
    facts = {"layer": number, "documents": states.values.shape[1]}
    apart = (1.0 - _cosines(means @ means.T)) / 2
    return _measured("states", tags, apart, facts, path, states.made_from).spread(languages or tags)


def alignment(
    path: str | os.PathLike[str], languages: Sequence[str] | None = None, layer: int | None = None
) -> Distances:
    """1 - linear CKA (Kornblith et al. 2019, arXiv 1905.00414) of the states of parallel documents,
    0..1: 0 where two languages lay out the same meanings alike, however turned or scaled. Arguments
    and errors as in `cosine`; UserError for fewer than three documents."""
    states = States.load(path)
    tags, number, values = _of_layer(states, path, languages, layer)
    if values.shape[1] < 3:
        raise UserError(f"{path} has {values.shape[1]} documents of each language; 3 are wanted")
    centred = values - values.mean(axis=1, keepdims=True, dtype=np.float64)
    # By documents x documents, which are fewer than D in large models.
    inner = centred @ centred.swapaxes(1, 2)
    flat = inner.reshape(len(inner), -1)
    facts = {"layer": number, "documents": states.values.shape[1]}
    apart = 1.0 - _cosines(flat @ flat.T)
    return _measured("alignment", tags, apart, facts, path, states.made_from).spread(
        languages or tags
    )


def updates(
    path: str | os.PathLike[str], languages: Sequence[str] | None = None, layer: int | None = None
) -> Distances:
    """(1 - cos) / 2 of the languages' updates, 0..1: half of Group then Scale's 1 - cos.

    Of the feed-forward weights. layer: 1 to the number of layers; None takes the last three, as in
    that paper's code. Languages and errors as in `cosine`.
    """
    found = Updates.load(path)
    tags, index = _chosen(found.languages, path, languages)
    count = len(found.inner)
    first = max(1, count - 2) if layer is None else layer
    last = count if layer is None else _layer(layer, count, path)
    inner = found.inner[first - 1 : last].sum(axis=0)[np.ix_(index, index)]
    facts = {"layers": [first, last]}
    apart = (1.0 - _cosines(inner)) / 2
    return _measured("updates", tags, apart, facts, path, found.made_from).spread(languages or tags)


def losses(
    languages: Sequence[str],
    nats: Float[np.ndarray, "languages languages"],
    made_from: Mapping[str, str],
) -> Distances:
    """Share of the loss that the own expert of a language spares it beside the other's, 0..1, mean
    of both directions; 0 where the other's is no worse.

    nats: of the expert of the row's language on text of the column's; NaN where that is not known.
    """
    tags = canonical_all(languages)
    with np.errstate(divide="ignore", invalid="ignore"):
        spared = np.maximum(1.0 - np.diagonal(nats) / nats, 0.0)
    return _measured("losses", tags, spared, {}, None, made_from)


def _of_layer(
    states: States,
    path: str | os.PathLike[str],
    languages: Sequence[str] | None,
    layer: int | None,
) -> tuple[tuple[str, ...], int, np.ndarray]:
    """Tags, number of the layer, and values [languages, documents, D]."""
    tags, index = _chosen(states.languages, path, languages)
    layers = states.values.shape[2]
    number = -(-layers // 2) if layer is None else _layer(layer, layers, path)
    return tags, number, states.values[index, :, number - 1]


def _chosen(
    known: tuple[str, ...], path: str | os.PathLike[str], languages: Sequence[str] | None
) -> tuple[tuple[str, ...], list[int]]:
    """Those of the languages that are known, and where they stand; UserError if none is."""
    wanted = known if languages is None else canonical_all(languages)
    tags = tuple(tag for tag in wanted if tag in known)
    if not tags:
        raise UserError(f"{path} knows nothing of {', '.join(wanted[:5])}")
    return tags, [known.index(tag) for tag in tags]


def _layer(number: int, count: int, path: str | os.PathLike[str]) -> int:
    if not 1 <= number <= count:
        raise UserError(f"layer must be between 1 and {count}, as {path} has them; got {number}")
    return number


def _cosines(inner: np.ndarray) -> np.ndarray:
    """From inner products; NaN of what has no length."""
    lengths = np.sqrt(np.diagonal(inner))
    with np.errstate(invalid="ignore"):
        return inner / np.outer(lengths, lengths)


def _measured(
    measure: str,
    tags: tuple[str, ...],
    values: np.ndarray,
    parameters: Mapping[str, int | list[int]],
    path: str | os.PathLike[str] | None,
    made_from: Mapping[str, str],
) -> Distances:
    values = np.clip((values + values.T) / 2, 0.0, 1.0)
    np.fill_diagonal(values, 0.0)
    own = {} if path is None else {Path(path).name: files.sha256(path)}
    return Distances(
        measure=measure,
        languages=tags,
        values=values,
        coverage=(~np.isnan(values)).astype(float),
        parameters=dict(parameters),
        made_from={**own, **made_from},
    )


def _save(
    path: str | os.PathLike[str],
    name: str,
    languages: tuple[str, ...],
    values: np.ndarray,
    made_from: Mapping[str, str],
) -> None:
    arrays = {"languages": np.array(languages, str), name: values}
    names, hashes = (np.array(list(part), str) for part in (made_from, made_from.values()))
    files.write_arrays(path, {**arrays, "made_from": names, "hashes": hashes})


def _load(
    path: str | os.PathLike[str], name: str, dimensions: str
) -> tuple[tuple[str, ...], np.ndarray, dict[str, str]]:
    """Tags, values and inputs of a file with an array of this name and these dimensions."""
    arrays, axes = files.read_arrays(path), dimensions.split()
    tags, values = arrays.get("languages"), arrays.get(name)
    if (
        tags is None
        or values is None
        or values.ndim != len(axes)
        or any(n != len(tags) for n, axis in zip(values.shape, axes) if axis == "languages")
    ):
        raise UserError(
            f"{path} wants arrays 'languages' and {name!r} [{', '.join(axes)}], as xelm features "
            "writes them"
        )
    named = (arrays.get(part, np.array([], str)).tolist() for part in ("made_from", "hashes"))
    return canonical_all(tags.tolist()), values, dict(zip(*named))
