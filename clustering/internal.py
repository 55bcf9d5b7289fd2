"""How near languages are to each other inside a model: its states, read from a file of arrays.

Knows the file and the distances. Does not know models: `xelm features` writes the file.
"""

import os
from collections.abc import Sequence
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
        names = np.array(list(self.made_from), str)
        hashes = np.array(list(self.made_from.values()), str)
        arrays = {"languages": np.array(self.languages, str), "states": self.values}
        files.write_arrays(path, {**arrays, "made_from": names, "hashes": hashes})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "States":
        """From what `save` wrote; UserError for something else."""
        arrays = files.read_arrays(path)
        values, tags = arrays.get("states"), arrays.get("languages")
        if values is None or tags is None or values.ndim != 4 or len(values) != len(tags):
            raise UserError(
                f"{path} wants arrays 'languages' and 'states' [languages, documents, layers, D], "
                "as xelm features writes them"
            )
        named = (arrays.get(name, np.array([], str)).tolist() for name in ("made_from", "hashes"))
        return cls(
            languages=canonical_all(tags.tolist()), values=values, made_from=dict(zip(*named))
        )


def cosine(
    path: str | os.PathLike[str], languages: Sequence[str] | None = None, layer: int | None = None
) -> Distances:
    """(1 - cos) / 2 of the languages' mean states, 0..1, once the mean over all languages is taken
    away: what they have in common says nothing about who is near whom, and hides it.

    layer: 1 to the number of layers; None takes the middle one, where states are least bound to
    words. UserError for a layer or language that the file does not have.
    """
    states = States.load(path)
    tags, number, values = _chosen(states, path, languages, layer)
    means = values.mean(axis=1, dtype=np.float64)
    means -= means.mean(axis=0)
    lengths = np.linalg.norm(means, axis=1)
    with np.errstate(invalid="ignore"):
        apart = (1.0 - means @ means.T / np.outer(lengths, lengths)) / 2
    return _measured("states", states, path, tags, number, apart)


def alignment(
    path: str | os.PathLike[str], languages: Sequence[str] | None = None, layer: int | None = None
) -> Distances:
    """1 - linear CKA (Kornblith et al. 2019, arXiv 1905.00414) of the states of parallel documents,
    0..1: 0 where two languages lay out the same meanings alike, however turned or scaled. Arguments
    and errors as in `cosine`; UserError for fewer than three documents."""
    states = States.load(path)
    tags, number, values = _chosen(states, path, languages, layer)
    if values.shape[1] < 3:
        raise UserError(f"{path} has {values.shape[1]} documents of each language; 3 are wanted")
    centred = values - values.mean(axis=1, keepdims=True, dtype=np.float64)
    # By documents x documents, which are fewer than D in large models.
    inner = centred @ centred.swapaxes(1, 2)
    flat = inner.reshape(len(inner), -1)
    lengths = np.linalg.norm(flat, axis=1)
    with np.errstate(invalid="ignore"):
        apart = 1.0 - flat @ flat.T / np.outer(lengths, lengths)
    return _measured("alignment", states, path, tags, number, apart)


def _chosen(
    states: States,
    path: str | os.PathLike[str],
    languages: Sequence[str] | None,
    layer: int | None,
) -> tuple[tuple[str, ...], int, np.ndarray]:
    """Tags, number of the layer, and values [languages, documents, D]."""
    tags = states.languages if languages is None else canonical_all(languages)
    missing = [tag for tag in tags if tag not in states.languages]
    if missing:
        raise UserError(f"{path} has no states of {', '.join(missing[:5])}")
    layers = states.values.shape[2]
    number = -(-layers // 2) if layer is None else layer
    if not 1 <= number <= layers:
        raise UserError(f"layer must be between 1 and {layers}, as {path} has them; got {number}")
    index = [states.languages.index(tag) for tag in tags]
    return tags, number, states.values[index, :, number - 1]


def _measured(
    measure: str,
    states: States,
    path: str | os.PathLike[str],
    tags: tuple[str, ...],
    layer: int,
    values: np.ndarray,
) -> Distances:
    values = np.clip((values + values.T) / 2, 0.0, 1.0)
    np.fill_diagonal(values, 0.0)
    return Distances(
        measure=measure,
        languages=tags,
        values=values,
        coverage=np.ones_like(values),
        parameters={"layer": layer, "documents": states.values.shape[1]},
        made_from={Path(path).name: files.sha256(path)} | states.made_from,
    )
