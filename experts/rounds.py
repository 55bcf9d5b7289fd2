"""Training in rounds from scratch: experts of coarse clusters are the parents of those of finer
ones (hierarchical multi-round training of X-ELM, https://arxiv.org/abs/2401.10440, section 5).

All records are made at once. An expert of a later round awaits its parent, and starts from it once
that is trained; experts of all rounds but the last are intermediate: never in use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from clustering.errors import UserError
from experts.expert import SEED, Expert
from experts.registry import Registry


def rounds_of(registry: Registry) -> tuple[int, ...]:
    """Numbers of clusters of the rounds that experts are trained in, coarse to fine; empty if they
    are trained in one round."""
    counts = {expert.round_clusters for expert in registry.experts if expert.round_clusters}
    finest = {e.cluster for e in registry.experts if e.cluster and not e.intermediate}
    return (*sorted(counts), len(finest)) if counts else ()


def begin_rounds(registry: Registry, levels: Sequence[Mapping[str, Sequence[str]]]) -> Registry:
    """The registry with the experts of all rounds in training.

    levels: clusters of each round by name, coarse to fine; the last are those that the RUN was
    branched on, and each lies in one cluster of the round before. An intermediate expert is named
    after the number of clusters of its round, as in k4-en-de. UserError if experts of the clusters
    have begun to be trained."""
    begun = [
        expert.reference
        for expert in registry.experts
        if expert.status != "training" or expert.parent != SEED or expert.cluster is None
    ]
    if begun:
        raise UserError(
            f"rounds come before all other training, and {', '.join(begun[:5])} began already; "
            "make another RUN from the same seed (xelm init --seed)"
        )
    parents: dict[str, str] = {}
    finest = {expert.cluster: expert for expert in registry.experts}
    added: list[Expert] = []
    for clusters in levels:
        last, above = clusters is levels[-1], dict(parents)
        for cluster, languages in clusters.items():
            awaits = above.get(languages[0])
            if last:
                added.append(replace(finest[cluster], awaits=awaits))
                continue
            name = f"k{len(clusters)}-{cluster}"
            added.append(
                Expert(
                    name=name,
                    cluster=name,
                    languages=tuple(languages),
                    round_clusters=len(clusters),
                    awaits=awaits,
                )
            )
            parents |= dict.fromkeys(languages, name)
    return replace(registry, experts=tuple(added))


def next_round(registry: Registry) -> Registry:
    """The registry in which experts whose awaited parents are trained start from these; the same
    registry if there are none."""
    trained = {e.name: e for e in registry.experts if e.intermediate and e.sha256}
    ready = [e for e in registry.experts if e.awaits in trained]
    if not ready:
        return registry
    changed = {}
    for expert in ready:
        parent = trained[expert.awaits or ""]
        changed[expert.reference] = replace(
            expert, parent=parent.reference, round=parent.round + 1, awaits=None
        )
    experts = (changed.get(expert.reference, expert) for expert in registry.experts)
    return replace(registry, experts=tuple(experts))
