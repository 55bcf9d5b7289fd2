"""A `Clustering` <-> clusters.json and clusters.npz (DESIGN section 3).

Knows the keys and which arrays lie where. The JSON is written last and carries the hash of the
arrays, so a crash in between leaves no clustering, or one that is refused, and never a mixture.
"""

from pathlib import Path
from typing import Any

import numpy as np

from clustering import files
from clustering.clustering import Clustering
from clustering.distances import Distances
from clustering.errors import UserError
from clustering.tree import Merge
from clustering.vectoriser import Vectoriser

FORMAT = 1
"""Of clusters.json; rises when a key changes its meaning."""
JSON_NAME = "clusters.json"
ARRAYS_NAME = "clusters.npz"


def save(clustering: Clustering, directory: Path, *, overwrite: bool = False) -> None:
    """Write the two files; UserError if clusters.json is there and not `overwrite`."""
    if (directory / JSON_NAME).exists() and not overwrite:
        raise UserError(
            f"{directory / JSON_NAME} exists already; choose another folder, or ask to overwrite it"
        )
    arrays = _arrays(clustering)
    hash_of_arrays = None
    if arrays:
        files.write_arrays(directory / ARRAYS_NAME, arrays)
        hash_of_arrays = files.sha256(directory / ARRAYS_NAME)
    files.write_json(directory / JSON_NAME, _to_json(clustering, hash_of_arrays))
    if not arrays:
        (directory / ARRAYS_NAME).unlink(missing_ok=True)  # of the clustering that was overwritten


def load(directory: Path) -> Clustering:
    """Read the two files; UserError if missing, damaged, too new, or not of one clustering."""
    value = files.read_json(directory / JSON_NAME, newest_format=FORMAT)
    arrays: dict[str, np.ndarray] = {}
    if value.get("arrays"):
        path = directory / ARRAYS_NAME
        if files.sha256(path) != value["arrays"].get("sha256"):
            raise UserError(
                f"{path} is not the file that {JSON_NAME} beside it was written with; cluster again"
            )
        arrays = files.read_arrays(path)
    try:
        return _from_json(value, arrays)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{directory / JSON_NAME} is damaged: {type(error).__name__}: {error}"
        ) from error


def _arrays(clustering: Clustering) -> dict[str, np.ndarray]:
    vectoriser, distances = clustering.vectoriser, clustering.distances
    every = {
        "distances": None if distances is None else distances.values,
        "coverage": None if distances is None else distances.coverage,
        "centres": clustering.centres,
        "idf": None if vectoriser is None else vectoriser.idf,
        "projection": None if vectoriser is None else vectoriser.projection,
    }
    return {name: array for name, array in every.items() if array is not None}


def _to_json(clustering: Clustering, hash_of_arrays: str | None) -> dict[str, Any]:
    def where(array: object, name: str) -> dict[str, str] | None:
        return None if array is None else {"file": ARRAYS_NAME, "array": name}

    return {
        "format": FORMAT,
        "method": clustering.method,
        "parameters": clustering.parameters,
        "clusters": clustering.clusters,
        "unassigned": clustering.unassigned,
        "languages": clustering.languages,
        "distances": _distances_to_json(clustering.distances),
        "merges": None
        if clustering.merges is None
        else [merge._asdict() for merge in clustering.merges],
        "documents": clustering.documents,
        "shares": clustering.shares,
        "centres": where(clustering.centres, "centres"),
        "idf": where(clustering.vectoriser, "idf"),
        "projection": where(clustering.vectoriser, "projection"),
        "arrays": None
        if hash_of_arrays is None
        else {"file": ARRAYS_NAME, "sha256": hash_of_arrays},
        "made_from": clustering.made_from,
    }


def _from_json(value: dict[str, Any], arrays: dict[str, np.ndarray]) -> Clustering:
    merges = value.get("merges")
    return Clustering(
        method=value["method"],
        parameters=value["parameters"],
        clusters={name: tuple(members) for name, members in value["clusters"].items()},
        unassigned=tuple(value["unassigned"]),
        languages=tuple(value["languages"]),
        distances=_distances(value, arrays),
        merges=None if merges is None else tuple(_merge(merge) for merge in merges),
        documents=value.get("documents"),
        vectoriser=Vectoriser(idf=arrays["idf"], projection=arrays["projection"])
        if "idf" in arrays
        else None,
        centres=arrays.get("centres"),
        made_from=value.get("made_from", {}),
    )


def _distances_to_json(distances: Distances | None) -> dict[str, Any] | None:
    if distances is None:
        return None
    return {
        "file": ARRAYS_NAME,
        "array": "distances",
        "coverage": "coverage",
        "measure": distances.measure,
        "parameters": distances.parameters,
        "made_from": distances.made_from,
    }


def _distances(value: dict[str, Any], arrays: dict[str, np.ndarray]) -> Distances | None:
    facts = value.get("distances")
    if facts is None:
        return None
    return Distances(
        measure=facts["measure"],
        languages=tuple(value["languages"]),
        values=arrays["distances"],
        coverage=arrays["coverage"],
        parameters=facts["parameters"],
        made_from=facts["made_from"],
    )


def _merge(value: dict[str, Any]) -> Merge:
    return Merge(tuple(value["members_a"]), tuple(value["members_b"]), value["distance"])
