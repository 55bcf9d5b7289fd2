"""The `Clustering`: which languages or documents belong together, as a value and on disk.

The package `experts` and `xelm` take it as their argument. It knows which language is in which
cluster, how the clusters were made, and, for clusters of documents, the vectoriser and the centres
that place a new document. On disk it is clusters.json and clusters.npz. It does not know experts,
models or corpora.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Integer

from clustering import figures, files, maps
from clustering.distances import Distances
from clustering.errors import UserError
from clustering.languages import english_name, find
from clustering.names import check_cluster_names
from clustering.tree import Merge
from clustering.values import ArrayValue
from clustering.vectoriser import Vectoriser

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = 1
"""Number of the format of clusters.json; rises when a key changes its meaning."""
JSON_NAME = "clusters.json"
ARRAYS_NAME = "clusters.npz"
_FEW_FEATURES = 0.5
"""Share of known features below which a table names a language: the gaps make it distant."""
_MOST_NAMES = 6
"""Number of clusters or languages that a line names before it counts the others."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Clustering(ArrayValue):
    """Clusters of languages or of documents; immutable, and equal after saving and loading.

    `str` gives a table. The `plot_` methods draw on `ax` or on a new figure, and return the axes;
    they raise UserError without what they draw. UserError for clusters that lose or double a
    language, ValueError for arrays that do not fit."""

    method: str
    """How the clusters were made, such as typology, tfidf, random or by-hand."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """The arguments of the method and what it reports, as JSON values."""
    clusters: dict[str, tuple[str, ...]]
    """Name -> languages. Each language is in exactly one cluster; in clusters of documents, it is
    in each that has documents in it, and the most frequent comes first."""
    unassigned: tuple[str, ...] = ()
    """Languages in no cluster: left out on purpose, or because too little is known about them."""
    languages: tuple[str, ...]
    """All languages of the clusters, in the given order; the rows of `distances`."""
    distances: Distances | None = None
    """Distances between the languages, in their order; None where the method has none."""
    merges: tuple[Merge, ...] | None = None
    """The tree, from single languages to one group; None where the method has none."""
    documents: dict[str, dict[str, int]] | None = None
    """Cluster -> language -> number of documents; None for clusters of languages."""
    vectoriser: Vectoriser | None = None
    """What turns a document into a vector; None for clusters of languages."""
    centres: Float[np.ndarray, "C D"] | None = None
    """Centre of each cluster, in the order of `clusters`; None for clusters of languages."""
    made_from: dict[str, str] = field(default_factory=dict)
    """Name of an input -> its SHA-256 or version."""

    def __post_init__(self) -> None:
        check_cluster_names(self.clusters)
        _check_languages(self)
        _check_arrays(self)
        if json.loads(json.dumps(self.parameters)) != self.parameters:
            raise ValueError(f"parameters must be JSON values; got {self.parameters}")

    def __repr__(self) -> str:
        return f"<Clustering {self.method}: {_counts(self)}: {_listed(list(self.clusters))}>"

    def __str__(self) -> str:
        return _table(self)

    @property
    def of_documents(self) -> bool:
        """Whether documents are clustered, not languages."""
        return self.documents is not None

    @property
    def shares(self) -> dict[str, dict[str, float]] | None:
        """Cluster -> language -> share of the cluster's documents, 0..1; None for clusters of
        languages."""
        return None if self.documents is None else figures.shares_of(self.documents)

    @property
    def cluster_by_language(self) -> dict[str, str]:
        """Language -> its cluster, in the order of `languages`; in clusters of documents, the one
        with most of its documents, and of equals the first."""
        found: dict[str, str] = {}
        for name, members in self.clusters.items():
            for tag in members:
                counts = self.documents
                if tag not in found or (counts and counts[name][tag] > counts[found[tag]][tag]):
                    found[tag] = name
        return {tag: found[tag] for tag in self.languages}

    def cluster_of(self, language: str) -> str:
        """The cluster of a language; in clusters of documents, the one with most of its documents.

        Takes any code of the language; raises UserError if no cluster has it."""
        tag = find(language, [*self.languages, *self.unassigned])
        if tag is None or tag not in self.languages:
            why = "is unassigned" if tag in self.unassigned else "is not among the languages"
            known = ", ".join(self.languages)
            raise UserError(f"{language} {why} of this clustering; those with a cluster: {known}")
        return self.cluster_by_language[tag]

    def assign(self, documents: Iterable[np.ndarray]) -> Integer[np.ndarray, " documents"]:
        """Index into `clusters` of each document, given by its terms, integers [tokens]; int32.

        Documents are read a batch at a time. Raises ValueError for clusters of languages."""
        if self.vectoriser is None or self.centres is None:
            raise ValueError("these are clusters of languages: use cluster_of")
        return np.fromiter(self.vectoriser.nearest(documents, self.centres), np.int32)

    def renamed(self, names: Mapping[str, str]) -> "Clustering":
        """The same clustering with other names for some clusters, old -> new; UserError for an
        unknown cluster, and for new names that a cluster cannot have."""
        unknown = [name for name in names if name not in self.clusters]
        if unknown:
            known = ", ".join(self.clusters)
            raise UserError(f"no cluster {', '.join(unknown[:5])}; there are {known}")
        new = [names.get(name, name) for name in self.clusters]
        check_cluster_names(new)
        documents = self.documents
        return replace(
            self,
            clusters=dict(zip(new, self.clusters.values())),
            documents=None if documents is None else dict(zip(new, documents.values())),
        )

    def plot_tree(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the tree."""
        merges, names = self._wanted(self.merges, "a tree of joins"), tuple(self.clusters)
        return figures.dendrogram(self.cluster_by_language, merges, names, self.method, ax)

    def plot_distances(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the distances between all languages."""
        distances = self._wanted(self.distances, "distances between languages")
        return figures.distance_heatmap(distances, self.clusters, self.merges, ax)

    def plot_composition(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the languages of each cluster of documents."""
        documents = self._wanted(self.documents, "clusters of documents")
        return figures.cluster_composition(documents, ax)

    def plot_sizes(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the size of each cluster: its documents, its tokens where these were balanced, or
        else its languages."""
        if self.documents is not None:
            sizes = {name: sum(counts.values()) for name, counts in self.documents.items()}
            return figures.cluster_sizes(sizes, "documents", ax)
        tokens = self.parameters.get("sizes")
        weights = tokens or dict.fromkeys(self.languages, 1)
        sizes = {name: sum(weights[tag] for tag in m) for name, m in self.clusters.items()}
        return figures.cluster_sizes(sizes, "tokens" if tokens else "languages", ax)

    def plot_map(self, ax: "Axes | None" = None) -> "Axes":
        """Draws where the languages are spoken, for those that URIEL has a place for."""
        return maps.world_map(self.cluster_by_language, tuple(self.clusters), ax)

    def plot_plane(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the languages as points of a plane, near languages near each other."""
        distances = self._wanted(self.distances, "distances between languages")
        return maps.plane(distances, self.cluster_by_language, tuple(self.clusters), ax)

    def _wanted(self, part: Any, what: str) -> Any:
        """The part, or UserError where the method does not make it."""
        if part is None:
            raise UserError(f"the figure needs {what}; method {self.method!r} has none")
        return part

    def to_json(self, arrays_sha256: str | None = None) -> dict[str, Any]:
        """The content of clusters.json; `arrays_sha256` is the hash of clusters.npz beside it,
        which has `arrays`, or None without that file."""
        distances, merges, sha256 = self.distances, self.merges, arrays_sha256
        where = {name: {"file": ARRAYS_NAME, "array": name} for name in self.arrays()}
        return {
            "format": FORMAT,
            "method": self.method,
            "parameters": self.parameters,
            "clusters": self.clusters,
            "unassigned": self.unassigned,
            "languages": self.languages,
            "distances": None
            if distances is None
            else where["distances"]
            | {
                "coverage": "coverage",
                "measure": distances.measure,
                "parameters": distances.parameters,
                "made_from": distances.made_from,
            },
            "merges": None if merges is None else [merge._asdict() for merge in merges],
            "documents": self.documents,
            "shares": self.shares,
            "centres": where.get("centres"),
            "idf": where.get("idf"),
            "projection": where.get("projection"),
            "arrays": None if sha256 is None else {"file": ARRAYS_NAME, "sha256": sha256},
            "made_from": self.made_from,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """The content of clusters.npz; empty where the clustering has no arrays."""
        found = {"centres": self.centres}
        if self.distances is not None:
            found |= {"distances": self.distances.values, "coverage": self.distances.coverage}
        if self.vectoriser is not None:
            found |= {"idf": self.vectoriser.idf, "projection": self.vectoriser.projection}
        return {name: array for name, array in found.items() if array is not None}

    @classmethod
    def from_json(cls, value: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> "Clustering":
        """The clustering of a clusters.json and the arrays beside it; KeyError, TypeError or
        ValueError where they are damaged, UserError where they contradict each other."""
        languages = tuple(value["languages"])
        distances = vectoriser = merges = None
        if (facts := value.get("distances")) is not None:
            distances = Distances(
                measure=facts["measure"],
                languages=languages,
                values=arrays["distances"],
                coverage=arrays["coverage"],
                parameters=facts["parameters"],
                made_from=facts["made_from"],
            )
        if (joins := value.get("merges")) is not None:
            sides = [(tuple(join["members_a"]), tuple(join["members_b"])) for join in joins]
            merges = tuple(Merge(*pair, join["distance"]) for pair, join in zip(sides, joins))
        if "idf" in arrays:
            vectoriser = Vectoriser(idf=arrays["idf"], projection=arrays["projection"])
        return cls(
            method=value["method"],
            parameters=value["parameters"],
            clusters={name: tuple(members) for name, members in value["clusters"].items()},
            unassigned=tuple(value["unassigned"]),
            languages=languages,
            distances=distances,
            merges=merges,
            documents=value.get("documents"),
            vectoriser=vectoriser,
            centres=arrays.get("centres"),
            made_from=value.get("made_from", {}),
        )

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes clusters.json, and clusters.npz if there are arrays.

        The JSON is written last and has the hash of the arrays, so that a crash in between leaves
        no clustering, or one that is refused, and never a mixture. Raises UserError if the
        directory has a clusters.json already, unless `overwrite`."""
        json_path, arrays_path = Path(directory) / JSON_NAME, Path(directory) / ARRAYS_NAME
        if json_path.exists() and not overwrite:
            raise UserError(f"{json_path} exists already; choose another folder, or overwrite it")
        arrays = self.arrays()
        if arrays:
            files.write_arrays(arrays_path, arrays)
        files.write_json(json_path, self.to_json(files.sha256(arrays_path) if arrays else None))
        if not arrays:  # then the file is that of the clustering that was overwritten
            arrays_path.unlink(missing_ok=True)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Clustering":
        """The clustering saved in a directory; UserError if missing, damaged, of a newer format, or
        with the arrays of another clustering."""
        json_path, arrays_path = Path(directory) / JSON_NAME, Path(directory) / ARRAYS_NAME
        value = files.read_json(json_path, newest_format=FORMAT)
        arrays: dict[str, np.ndarray] = {}
        try:
            if recorded := value.get("arrays"):
                if recorded["sha256"] != files.sha256(arrays_path):
                    raise UserError(
                        f"{arrays_path} is not the file that {JSON_NAME} beside it was written "
                        "with; cluster again"
                    )
                arrays = files.read_arrays(arrays_path)
            return cls.from_json(value, arrays)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{json_path} is damaged: {type(error).__name__}: {error}") from error


def _check_languages(clustering: Clustering) -> None:
    listed, clusters, documents = clustering.languages, clustering.clusters, clustering.documents
    members = [tag for group in clusters.values() for tag in group]
    several = [tag for tag in members if members.count(tag) > 1]
    found = {
        "is empty": [name for name, group in clusters.items() if not group],
        "is in several clusters": several if documents is None else [],
        "has documents in other languages": [
            name
            for name in clusters | (documents or {})
            if documents is not None and tuple(documents.get(name, ())) != clusters.get(name)
        ],
        "is listed twice": [tag for tag in listed if listed.count(tag) > 1],
        "is in no cluster": [tag for tag in listed if tag not in members],
        "is not listed": [tag for tag in members if tag not in listed],
        "is both unassigned and in a cluster": [t for t in clustering.unassigned if t in members],
    }
    faults = [f"{name} {fault}" for fault, names in found.items() for name in dict.fromkeys(names)]
    if faults:
        raise UserError(
            "every language must be in exactly one cluster or unassigned; but "
            f"{'; '.join(faults[:5])}"
        )


def _check_arrays(clustering: Clustering) -> None:
    count = len(clustering.languages)
    if clustering.distances is not None and clustering.distances.languages != clustering.languages:
        raise ValueError("distances must be of the languages, in their order")
    if clustering.merges is not None and len(clustering.merges) != count - 1:
        raise ValueError(
            f"a tree over {count} languages has {count - 1} merges; got {len(clustering.merges)}"
        )
    vectoriser, centres = clustering.vectoriser, clustering.centres
    if len({part is None for part in (clustering.documents, vectoriser, centres)}) > 1:
        raise ValueError("documents, vectoriser and centres come together or not at all")
    if vectoriser is not None and centres is not None:
        wanted = (len(clustering.clusters), vectoriser.dimensions)
        if centres.shape != wanted:
            raise ValueError(f"centres must be {list(wanted)}; got {list(centres.shape)}")


def _counts(clustering: Clustering) -> str:
    kind = "documents" if clustering.of_documents else "languages"
    return f"{len(clustering.languages)} languages, {len(clustering.clusters)} clusters of {kind}"


def _listed(words: list[str]) -> str:
    more = f", {len(words) - _MOST_NAMES} more" if len(words) > _MOST_NAMES else ""
    return f"{', '.join(words[:_MOST_NAMES])}{more}"


def _table(clustering: Clustering) -> str:
    """A line for each cluster with its languages, and lines for languages without one."""
    lines = [f"{clustering.method}: {_counts(clustering)}"]
    width = max(len(name) for name in clustering.clusters)
    shares = clustering.shares
    for name, members in clustering.clusters.items():
        text = ", ".join(english_name(tag) for tag in members)
        if clustering.documents is not None and shares is not None:
            parts = [f"{tag} {share:.0%}" for tag, share in shares[name].items()]
            text = f"{sum(clustering.documents[name].values())} documents: {_listed(parts)}"
        lines.append(f"  {name:<{width}}  {text}")
    if clustering.distances is not None:
        known = zip(clustering.languages, np.diagonal(clustering.distances.coverage))
        little = [f"{tag} ({share:.0%})" for tag, share in known if share < _FEW_FEATURES]
        if little:
            lines.append(f"  less than half of the features known: {', '.join(little)}")
    if clustering.unassigned:
        lines.append(f"  unassigned: {', '.join(map(english_name, clustering.unassigned))}")
    return "\n".join(lines)
