"""Branching: one expert for each cluster, all from the seed (X-ELM, arXiv 2401.10440)."""

from collections.abc import Sequence

from clustering.clustering import Clustering
from clustering.errors import UserError
from experts.expert import Expert
from experts.registry import Registry


def branch(registry: Registry, clustering: Clustering) -> Registry:
    """The registry with one expert in training for each cluster; the same clusters change nothing.

    In clusters of documents, a language is served by the expert whose cluster has most of its
    documents. UserError if the registry has experts of other clusters, and for a language that an
    expert of no cluster serves already."""
    wanted = _experts(clustering)
    # Of further versions, which languages may have joined, the first is compared.
    firsts: dict[str, Expert] = {}
    for expert in registry.experts:
        if expert.cluster is not None and not expert.intermediate:
            firsts.setdefault(expert.cluster, expert)
    existing = list(firsts.values())
    if not existing:
        for expert in wanted:
            for tag in expert.languages:
                if (holder := registry.holder_of(tag)) is not None:
                    raise UserError(
                        f"{tag!r} of the cluster {expert.name} is held by {holder.reference} "
                        f"({holder.status}) already; cluster the other languages (xelm cluster "
                        f"--languages), or take it out of use with: xelm retire RUN {holder.name}"
                    )
        return registry.add(*wanted)
    if {_identity(expert) for expert in existing} != {_identity(expert) for expert in wanted}:
        raise UserError(
            f"this RUN was branched on other clusters: {_describe(existing)}; got "
            f"{_describe(wanted)}. Make a new RUN for other clusters"
        )
    return registry


def _experts(clustering: Clustering) -> list[Expert]:
    documents = clustering.documents or {}
    return [
        Expert(
            name=name,
            cluster=name,
            languages=tuple(tag for tag in languages if clustering.cluster_of(tag) == name),
            documents=documents.get(name),
        )
        for name, languages in clustering.clusters.items()
    ]


def _identity(expert: Expert) -> tuple[object, ...]:
    """Name, languages and documents of a cluster, without their order; its expert may have another
    name by now."""
    documents = None if expert.documents is None else frozenset(expert.documents.items())
    return expert.cluster, frozenset(expert.languages), documents


def _describe(experts: Sequence[Expert]) -> str:
    shown = [f"{e.name} ({' '.join(e.documents or e.languages)})" for e in experts[:5]]
    return ", ".join(shown) + (f" and {len(experts) - 5} more" if len(experts) > 5 else "")
