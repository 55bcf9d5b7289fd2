"""Adopting: a model that was trained elsewhere becomes an expert, or the next version of one."""

from collections.abc import Mapping, Sequence
from typing import Any

from clustering.errors import UserError
from clustering.languages import canonical_all
from experts.expert import SEED, Expert, check_name, parse_reference
from experts.registry import Registry


def adopt(
    registry: Registry,
    languages: Sequence[str],
    parent: str = SEED,
    name: str | None = None,
    *,
    corpora: tuple[str, ...] = (),
    made: Mapping[str, Any],
    vocabulary: Mapping[str, Any] | None = None,
) -> Registry:
    """The registry with a further expert, which has its weights from elsewhere, in training.

    parent: 'NAME' (its published version), 'NAME@vN' or 'seed'. name: None joins the languages with
    '-'. The name of an expert makes its next version, in place of the version in use: `languages`
    must be its own then, or empty, and `corpora` are added to those that it has. `corpora`, `made`
    and `vocabulary` are those of `Expert`. UserError if another expert serves one of the languages,
    which says what can be done, and if the parent has no weights.
    """
    tags = tuple(canonical_all(languages)) if languages else ()
    if name is None and not tags:
        raise UserError("name the languages of the new expert, such as --languages sv")
    name = "-".join(tags) if name is None else name
    check_name(name)
    origin = parent_of(registry, parent)
    facts = {"made": dict(made), "vocabulary": dict(vocabulary) if vocabulary else None}
    if any(expert.name == name for expert in registry.experts):
        return _next_version(registry, name, tags, origin, corpora, facts)
    for tag in tags:
        if (holder := registry.holder_of(tag)) is not None:
            raise _served_already(tag, holder, tags)
    expert = Expert(
        name=name,
        version=registry.next_version(name),
        parent=origin,
        round=registry.round_after(origin, name),
        languages=tags,
        corpora=corpora,
        **facts,
    )
    return registry.add(expert)


def _next_version(
    registry: Registry,
    name: str,
    tags: tuple[str, ...],
    origin: str,
    corpora: tuple[str, ...],
    facts: Mapping[str, Any],
) -> Registry:
    before = registry.in_use(name)  # refuses one that is retired or in training
    if tags and set(tags) != set(before.languages):
        own = ", ".join(before.languages) or "documents of a cluster"
        raise UserError(
            f"the next version of {name} has its languages, {own}; got {', '.join(tags)}. Leave "
            "--languages out, or give another name"
        )
    known = (before.corpora or ()) if before.cluster is not None else before.texts
    kept = (*known, *corpora) or (None if before.cluster is not None else ())
    return registry.start(name, parent=origin, corpora=kept, reason=None, **facts)


def parent_of(registry: Registry, parent: str) -> str:
    """Reference of the model that 'NAME' (its published version), 'NAME@vN' or 'seed' names;
    UserError if it has no weights."""
    if parent == SEED:
        return SEED
    if "@" not in parent:
        return registry.in_use(parent).reference
    found = registry.expert(*parse_reference(parent))
    if not found.sha256:
        raise UserError(f"{found.reference} is {found.status}: it has no weights to descend from")
    return found.reference


def _served_already(tag: str, expert: Expert, tags: tuple[str, ...]) -> UserError:
    """The error for a language that an expert serves, or is trained for: what can be done."""
    if expert.status != "published":
        more = f"finish that, or give it up with: xelm discard RUN {expert.name}"
    elif set(tags) == set(expert.languages):
        more = f"to adopt it as the next version of that expert, give --name {expert.name}"
    else:
        more = (
            f"leave {tag} out, take that expert out of use with: xelm retire RUN {expert.name}, or "
            f"adopt this as its next version, for {', '.join(expert.languages)}, with --name "
            f"{expert.name}"
        )
    return UserError(f"{tag!r} is served already, by {expert.reference} ({expert.status}): {more}")
