"""The `Clustering`: who belongs together, as a value and on disk.

Crosses the border to `experts` and `xelm`. Knows which language is in which cluster, how that came
about, and for clusters of documents the vectoriser and centres that place a new document. Does not
know experts, models or corpora.
"""

import json
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Integer

from clustering import kmeans
from clustering.distances import Distances
from clustering.errors import UserError
from clustering.files import equal
from clustering.languages import english_name, find
from clustering.tree import Merge
from clustering.vectoriser import Vectoriser

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAME = re.compile(r"[^\W_][\w.-]*")
_LANGUAGES_IN_NAME = 4
_LETTERS_IN_NAME = 24
_LITTLE = 0.5
"""Share of the features below which a language is named: what is not known moves it away."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Clustering:
    """Clusters of languages, or of documents; immutable, and equal after saving and loading."""

    method: str
    """How it was made: typology, tfidf, random, by-hand."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """The arguments of the method and what it reports, as JSON values."""
    clusters: dict[str, tuple[str, ...]]
    """Name -> languages. Each language is in exactly one cluster; in clusters of documents, in each
    where it has documents, the commonest first."""
    unassigned: tuple[str, ...] = ()
    """Languages that belong to no cluster: left out on purpose, or because too little is known of
    them."""
    languages: tuple[str, ...]
    """All languages of the clusters, in the given order; the rows of `distances`."""
    distances: Distances | None = None
    """Between the languages, in their order; None where the method has none."""
    merges: tuple[Merge, ...] | None = None
    """The tree, from single languages to one group; None where the method has none."""
    documents: dict[str, dict[str, int]] | None = None
    """Cluster -> language -> documents, for clusters of documents; else None."""
    vectoriser: Vectoriser | None = None
    """What turns a document into a vector; None for clusters of languages."""
    centres: Float[np.ndarray, "C D"] | None = None
    """Centre of each cluster, in the order of `clusters`; None for clusters of languages."""
    made_from: dict[str, str] = field(default_factory=dict)
    """Name of an input -> its SHA-256 or version."""

    def __post_init__(self) -> None:
        _check_names(self.clusters)
        _check_languages(self)
        _check_arrays(self)
        if json.loads(json.dumps(self.parameters)) != self.parameters:
            raise ValueError(f"parameters must be JSON values; got {self.parameters}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Clustering):
            return NotImplemented
        return all(equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    __hash__ = None  # type: ignore[assignment]  # arrays do not hash

    def __repr__(self) -> str:
        return _table(self)

    @property
    def of_documents(self) -> bool:
        """Whether documents are clustered, not languages."""
        return self.documents is not None

    @property
    def shares(self) -> dict[str, dict[str, float]] | None:
        """Cluster -> language -> share of the cluster's documents, 0..1; None as `documents`."""
        if self.documents is None:
            return None
        return {
            name: {language: count / sum(counts.values()) for language, count in counts.items()}
            for name, counts in self.documents.items()
        }

    def cluster_of(self, language: str) -> str:
        """The cluster of a language; in clusters of documents, the one with most of its documents.

        Takes any code of the language; raises UserError if no cluster has it.
        """
        tag = find(language, [*self.languages, *self.unassigned])
        names = [name for name, members in self.clusters.items() if tag in members]
        if tag is None or not names:
            why = "is unassigned" if tag in self.unassigned else "is not among the languages"
            known = ", ".join(self.languages)
            raise UserError(f"{language} {why} of this clustering; those with a cluster: {known}")
        counts = self.documents
        return names[0] if counts is None else max(names, key=lambda name: counts[name][tag])

    def assign(
        self, vectors: Float[np.ndarray, "documents D"]
    ) -> Integer[np.ndarray, " documents"]:
        """Index into `clusters` of the centre nearest to each vector.

        Raises ValueError for clusters of languages, which have no centres.
        """
        if self.centres is None:
            raise ValueError("clusters of documents wanted; these are of languages: use cluster_of")
        return kmeans.assign(vectors, self.centres)

    def renamed(self, names: Mapping[str, str]) -> "Clustering":
        """The same with other names for some clusters, old -> new; UserError for a cluster that is
        not there, and for names that clusters cannot bear."""
        unknown = [name for name in names if name not in self.clusters]
        if unknown:
            raise UserError(
                f"no cluster {', '.join(unknown[:5])}; there are {', '.join(self.clusters)}"
            )
        new = [names.get(name, name) for name in self.clusters]
        _check_names(new)
        documents = self.documents
        return replace(
            self,
            clusters=dict(zip(new, self.clusters.values())),
            documents=None if documents is None else dict(zip(new, documents.values())),
        )

    def plot_tree(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the tree on `ax`, or on a new figure, and return the axes."""
        from clustering import figures

        return figures.dendrogram(self, ax)

    def plot_distances(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the distances on `ax`, or on a new figure, and return the axes."""
        from clustering import figures

        return figures.distance_heatmap(self, ax)

    def plot_composition(self, ax: "Axes | None" = None) -> "Axes":
        """Draw what clusters of documents hold on `ax`, or on a new figure, and return the axes."""
        from clustering import figures

        return figures.cluster_composition(self, ax)

    def plot_sizes(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the sizes of the clusters on `ax`, or on a new figure, and return the axes."""
        from clustering import figures

        return figures.cluster_sizes(self, ax)

    def plot_map(self, ax: "Axes | None" = None) -> "Axes":
        """Draw where the languages are spoken on `ax`, or on a new figure, and return the axes."""
        from clustering import maps

        return maps.world_map(self, ax)

    def plot_plane(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the languages near where they are near on `ax`, or on a new figure, and return the
        axes."""
        from clustering import maps

        return maps.plane(self, ax)

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write clusters.json, and clusters.npz if there are arrays.

        Raises UserError if the directory holds a clustering already and not `overwrite`.
        """
        from clustering import storage

        storage.save(self, Path(directory), overwrite=overwrite)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Clustering":
        """The clustering saved in a directory; UserError if missing, damaged or too new."""
        from clustering import storage

        return storage.load(Path(directory))


def name_clusters(groups: Iterable[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Name groups by their languages in the given order, as in `en-es`.

    Of more than four, or where that is longer than 24 letters, the first and a count: `en-plus7`.
    Names are good names of folders, and differ in more than case.
    """
    named: dict[str, tuple[str, ...]] = {}
    taken: dict[str, int] = {}
    for members in groups:
        name = "-".join(members)
        too_long = len(members) > _LANGUAGES_IN_NAME or len(name) > _LETTERS_IN_NAME
        if too_long and len(members) > 1:
            name = f"{members[0]}-plus{len(members) - 1}"
        # pt-BR alone and pt with br would meet in one folder on some machines.
        times = taken[name.casefold()] = taken.get(name.casefold(), 0) + 1
        named[name if times == 1 else f"{name}_{times}"] = tuple(members)
    return named


def _check_names(clusters: Collection[str]) -> None:
    if not clusters:
        raise UserError("a clustering wants at least one cluster; got none")
    # Names become folders: nothing may climb out of one or hide in it.
    bad = [name for name in clusters if not _NAME.fullmatch(name)]
    if bad:
        raise UserError(
            "cluster names want letters, digits, '_', '.' and '-', a letter or digit first; "
            f"got {bad[:5]}"
        )
    if len({unicodedata.normalize("NFC", name).casefold() for name in clusters}) < len(clusters):
        raise UserError(f"cluster names must differ in more than case; got {', '.join(clusters)}")


def _check_languages(clustering: Clustering) -> None:
    members = [language for group in clustering.clusters.values() for language in group]
    faults = [f"{name} is empty" for name, group in clustering.clusters.items() if not group]
    if clustering.documents is None:
        faults += [
            f"{tag} is in several clusters"
            for tag in dict.fromkeys(members)
            if members.count(tag) > 1
        ]
    elif {
        name: tuple(counts) for name, counts in clustering.documents.items()
    } != clustering.clusters:
        faults.append("documents do not have the languages of the clusters")
    faults += [
        f"{tag} is listed twice"
        for tag in clustering.languages
        if clustering.languages.count(tag) > 1
    ]
    faults += [f"{tag} is in no cluster" for tag in clustering.languages if tag not in members]
    faults += [
        f"{tag} is not listed" for tag in dict.fromkeys(members) if tag not in clustering.languages
    ]
    faults += [
        f"{tag} is both unassigned and in a cluster"
        for tag in clustering.unassigned
        if tag in members
    ]
    if faults:
        raise UserError(
            f"every language in exactly one cluster or in unassigned; but {'; '.join(faults[:5])}"
        )


def _check_arrays(clustering: Clustering) -> None:
    count = len(clustering.languages)
    if clustering.distances is not None and clustering.distances.languages != clustering.languages:
        raise ValueError("distances must be of the languages, in their order")
    if clustering.merges is not None and len(clustering.merges) != count - 1:
        raise ValueError(
            f"a tree over {count} languages has {count - 1} merges; got {len(clustering.merges)}"
        )
    parts = (clustering.documents, clustering.vectoriser, clustering.centres)
    if clustering.vectoriser is None or clustering.centres is None or clustering.documents is None:
        if any(part is not None for part in parts):
            raise ValueError("documents, vectoriser and centres come together or not at all")
        return
    wanted = (len(clustering.clusters), clustering.vectoriser.dimensions)
    if clustering.centres.shape != wanted:
        raise ValueError(f"centres must be {list(wanted)}; got {list(clustering.centres.shape)}")


def _table(clustering: Clustering) -> str:
    kind = "documents" if clustering.of_documents else "languages"
    shares = clustering.shares
    counts = f"{len(clustering.languages)} languages, {len(clustering.clusters)} clusters of {kind}"
    lines = [f"{clustering.method}: {counts}"]
    width = max(len(name) for name in clustering.clusters)
    for name, members in clustering.clusters.items():
        if shares is None or clustering.documents is None:
            text = ", ".join(english_name(tag) for tag in members)
        else:
            held = [f"{tag} {share:.0%}" for tag, share in shares[name].items()]
            more = f", {len(held) - 6} more" if len(held) > 6 else ""
            text = (
                f"{sum(clustering.documents[name].values())} documents: {', '.join(held[:6])}{more}"
            )
        lines.append(f"  {name:<{width}}  {text}")
    if clustering.distances is not None:
        known = np.diagonal(clustering.distances.coverage)
        little = [
            f"{tag} ({share:.0%})"
            for tag, share in zip(clustering.languages, known)
            if share < _LITTLE
        ]
        if little:
            lines.append(f"  of few features is a value known: {', '.join(little)}")
    if clustering.unassigned:
        lines.append(
            f"  unassigned: {', '.join(english_name(tag) for tag in clustering.unassigned)}"
        )
    return "\n".join(lines)
