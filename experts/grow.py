"""Growing: an expert for a new language from its nearest relative.

Hierarchical multi-round training (HMR) of X-ELM, https://arxiv.org/abs/2401.10440: the child starts
from the parent's weights one round later, and no other expert changes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from clustering.errors import UserError
from clustering.languages import canonical_all, find
from clustering.names import name_clusters
from experts.expert import SEED, Expert, parse_reference
from experts.registry import Registry


def grow(
    registry: Registry,
    languages: str | Sequence[str],
    parent: str,
    name: str | None = None,
    *,
    corpora: tuple[str, ...] | None = None,
    reason: str | None = None,
    settings: Mapping[str, int | float | str | None] | None = None,
    vocabulary: Mapping[str, Any] | None = None,
) -> Registry:
    """The registry with a child of `parent` in training for a language, or for several that form a
    cluster; other records stay as is.

    `parent` is 'NAME' (its published version), 'NAME@vN' or 'seed'; `corpora`, `reason`, `settings`
    and `vocabulary` are those of `Expert`. `name` is that of a cluster of the languages if None:
    the tag of a single one. Growing the same child again while it is in training changes nothing.
    UserError if another expert serves a language, if the parent is not published, or if the name is
    taken."""
    tags = canonical_all([languages] if isinstance(languages, str) else languages)
    if name is None:
        (name,) = name_clusters([tags])
    for expert in registry.training():
        wanted = (expert.parent, expert.parent.partition("@")[0])
        if expert.name == name and expert.languages == tags and parent in wanted:
            return registry
    for tag in tags:
        refuse_served(registry, tag)
    origin = _published_parent(registry, parent)
    child = Expert(
        name=name,
        version=_free_version(registry, tags, name),
        parent=origin,
        round=registry.round_after(origin, name),
        languages=tags,
        corpora=corpora,
        reason=reason,
        settings=dict(settings) if settings else None,
        vocabulary=dict(vocabulary) if vocabulary else None,
    )
    return registry.add(child)


def refuse_served(registry: Registry, language: str) -> None:
    """Raises UserError for a language that an expert serves, or is trained for."""
    if (expert := registry.holder_of(language)) is not None:
        raise served_already(language, expert)


def served_already(language: str, expert: Expert) -> UserError:
    """The error for a language that an expert serves, or is trained for: what can be done."""
    more = ""
    if expert.status == "published":
        more = f"; to train it on more text: xelm train RUN {expert.name} --again --corpus MORE"
    return UserError(
        f"{language!r} is served already, by {expert.reference} ({expert.status}){more}"
    )


def choose_parent(
    registry: Registry, ranked: Sequence[tuple[str, float]]
) -> tuple[Expert, str, float]:
    """The published expert that serves the nearest relative, that relative, and its distance.

    `ranked` has pairs of language and distance, in any order; of equal distances the first wins.
    Languages that no published expert serves, or whose distance is not finite, do not count;
    UserError if none is left."""
    served = {language for expert in registry.published() for language in expert.languages}
    known = [(language, far) for language, far in ranked if math.isfinite(far)]
    relatives = [(language, far) for language, far in known if find(language, served)]
    if not relatives:
        raise UserError(
            "no published expert serves a known relative; name a parent. "
            f"Relatives: {', '.join(language for language, _ in ranked[:5]) or 'none'}; "
            f"served: {', '.join(sorted(served)) or 'none'}"
        )
    language, distance = min(relatives, key=lambda pair: pair[1])
    return registry.for_language(language), language, distance


def begun_with(registry: Registry, expert: Expert) -> list[Expert]:
    """The experts that the same command began to grow as this one, which is among them, in the
    order of the registry."""
    known = {each.reference: each for each in registry.experts}
    for event in reversed(registry.history):
        if event.action == "grow" and expert.reference in event.experts:
            return [known[name] for name in event.experts if name in known]
    return [expert]


def is_grown(expert: Expert) -> bool:
    """Whether an expert is the first version of one that was grown for new languages."""
    return all(each is None for each in (expert.cluster, expert.donor, expert.joined, expert.made))


def _published_parent(registry: Registry, parent: str) -> str:
    if parent == SEED:
        return SEED
    known = registry.expert(*parse_reference(parent)) if "@" in parent else registry.expert(parent)
    if known.status != "published":
        if known.status == "retired":
            registry.in_use(known.name)  # refuses an expert that can be brought back, and says how
        raise UserError(
            f"{known.reference} is {known.status}; only a published expert can be a parent"
        )
    return known.reference


def _free_version(registry: Registry, tags: tuple[str, ...], name: str) -> int:
    """Version 1 for a new name, else that after the retired ones for these same languages."""
    versions = [expert for expert in registry.experts if expert.name == name]
    if any(expert.languages != tags for expert in versions):
        raise UserError(
            f"the name {name!r} is taken by an expert of other languages; give another name"
        )
    return registry.next_version(name)
