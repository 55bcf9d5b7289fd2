"""`xelm nearest`: relatives of a language by several measures, with the amount of text of each, and
the expert that a new language is grown from, which is that of the nearest relative."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from clustering.distances import Relative
from clustering.errors import UserError
from clustering.languages import canonical, canonical_all, english_name
from experts.expert import Expert
from experts.grow import choose_parent, refuse_served
from xelm.data.contents import contents_in
from xelm.data.corpus import AnyCorpus, Corpus
from xelm.runs.distances import Sources, languages_of, measured
from xelm.runs.run import Run

DEFAULT = "mixture"
"""Measure by which relatives are ranked and parents chosen unless another is given."""
LITTLE = 0.5
"""Coverage of the nearest relative below which a warning is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Relatives:
    """Relation of one other language to the given one."""

    language: str
    """Canonical tag."""
    by_measure: Mapping[str, Relative]
    """Measure -> distance and coverage."""
    tokens: int | None
    """Number of tokens in the RUN's corpus, or in the text of a grown expert; None without a
    RUN."""
    expert: str | None
    """The expert that serves the language in the RUN, as `name@version`, or None."""

    def to_json(self) -> dict[str, Any]:
        """The relation as JSON values."""
        measures = {
            name: {"distance": None if math.isnan(far) else far, "coverage": coverage}
            for name, (_, far, coverage) in self.by_measure.items()
        }
        return {
            "language": self.language,
            "name": english_name(self.language),
            **measures,
            "tokens": self.tokens,
            "expert": self.expert,
        }


def relatives(
    language: str, measures: Sequence[str], sources: Sources, others: Sequence[str] | None = None
) -> list[Relatives]:
    """The other languages, nearest first by the first of the measures, and last those of which it
    knows nothing. others: None takes those of a table, tagged text or states where the measures are
    made of these; of a RUN the languages that its experts serve, or its own before any is
    published; and else those of the corpus. UserError as `distances.measured`."""
    tag = canonical(language)
    if not measures:
        raise UserError("name a measure at least")
    tokens, experts = ({}, {}) if sources.run is None else _served(sources.run)
    if sources.run is not None and sources.corpus is None:
        # It may have text in further languages, and may be gone from this machine.
        own = Corpus.of(sources.run.record["corpus"])
        if all(Path(source.path).exists() for source in own.sources):
            sources = replace(sources, corpus=own)
    if others is None:
        others = _others(measures, sources, list(experts))
    known = [other for other in canonical_all(others) if other != tag]
    if not known:
        raise UserError(f"no language to compare {tag} with")
    found: dict[str, dict[str, Relative]] = {}
    for measure in measures:
        near = measured(measure, [tag, *known], sources).relatives(tag)
        found[measure] = {each.language: each for each in near}
    return [
        Relatives(
            language=other,
            by_measure={measure: near[other] for measure, near in found.items()},
            tokens=tokens.get(other),
            expert=experts.get(other),
        )
        for other in found[measures[0]]
    ]


def little_known(language: str, found: Sequence[Relatives], measure: str) -> str | None:
    """A warning if less than half of the compared features of a language and its nearest relative
    are known to a measure; otherwise None."""
    nearest = found[0].by_measure[measure]
    if nearest.coverage >= LITTLE:
        return None
    return (
        f"of {canonical(language)} and {nearest.language}, its nearest relative by {measure}, only "
        f"{nearest.coverage:.0%} of what is compared is known: look at the order before relying "
        "on it"
    )


class Parent(NamedTuple):
    """The expert that a new language is grown from."""

    expert: Expert
    reason: str
    """Reason for the choice, as in `serves es, the nearest language by ...`."""
    warnings: tuple[str, ...]
    """Warnings: served languages that the measure knows nothing of, and little coverage."""


def nearest_expert(
    run: Run, languages: str | Sequence[str], by: str = DEFAULT, corpus: AnyCorpus | None = None
) -> Parent:
    """The published expert that serves the nearest relative of a language by a measure, as
    `relatives` ranks them; of several languages, the nearest on average.

    corpus: may have text in the languages, whose subwords are compared with those of the RUN's.
    UserError if a language is served already, and if nothing is known of it.
    """
    tags = canonical_all([languages] if isinstance(languages, str) else languages)
    registry, found = run.registry(), {}
    for tag in tags:
        refuse_served(registry, tag)
    try:
        for tag in tags:
            found[tag] = relatives(tag, [by], Sources(run=run, corpus=corpus))
            if all(math.isnan(each.by_measure[by].distance) for each in found[tag]):
                raise UserError(f"{by} knows nothing of how near {tag} is to any language served")
        ranked = _mean_distances(found.values(), by)
        expert, relative, distance = choose_parent(registry, ranked)
    except UserError as error:
        if corpus is not None and str(error) == _fault_of(corpus, tags):
            raise
        raise UserError(f"{error}; name an expert to grow from with --parent") from error
    warnings = []
    for tag, near in found.items():
        far = [each.language for each in near if math.isnan(each.by_measure[by].distance)]
        if far:
            warnings.append(
                f"{by} knows nothing of how near {tag} is to {', '.join(far)}: not considered"
            )
        warnings.append(little_known(tag, near, by))
    known = f"of which {found[tags[0]][0].by_measure[by].coverage:.0%} is known"
    if len(tags) > 1:
        known = f"the mean of {' '.join(tags)}"
    reason = f"serves {relative}, the nearest language by {by}, at distance {distance:.3f}, {known}"
    return Parent(expert, reason, tuple(filter(None, warnings)))


def _fault_of(corpus: AnyCorpus, languages: Sequence[str]) -> str | None:
    """Why a corpus cannot be read in some languages; None if it can."""
    try:
        contents_in(corpus, languages)
    except UserError as error:
        return str(error)
    return None


def _mean_distances(found: Iterable[Sequence[Relatives]], by: str) -> list[tuple[str, float]]:
    """Other languages with their mean distance, by a measure, of those that it knows, nearest
    first; NaN where it knows none."""
    distances: dict[str, list[float]] = {}
    for near in found:
        for each in near:
            known = distances.setdefault(each.language, [])
            if not math.isnan(far := each.by_measure[by].distance):
                known.append(far)
    means = {tag: fmean(known) if known else math.nan for tag, known in distances.items()}
    return sorted(means.items(), key=lambda pair: (math.isnan(pair[1]), pair[1]))


def _others(measures: Sequence[str], sources: Sources, served: Sequence[str]) -> Sequence[str]:
    """Languages to compare with if none are named. A corpus given beside a RUN adds only text."""
    run = sources.run
    if run is None:
        return languages_of("+".join(measures), sources)
    listed = languages_of("+".join(measures), replace(sources, corpus=None))
    return served if served and canonical_all(listed) == run.languages else listed


def _served(run: Run) -> tuple[dict[str, int], dict[str, str]]:
    """Number of tokens of each language of a RUN, and the reference of its expert."""
    registry = run.registry()
    tags = {tag for e in registry.published() for tag in e.languages}
    # The order decides between equally near languages, so it must be the same each time.
    grown = [tag for e in registry.published() for tag in e.languages if tag not in run.languages]
    served = dict.fromkeys([*(tag for tag in run.languages if tag in tags), *grown])
    experts = {tag: registry.for_language(tag).reference for tag in served}
    texts = run.texts(dict.fromkeys([*run.languages, *experts]))
    return {tag: sum(len(ids.ids) for ids in some) for tag, some in texts.items()}, experts
