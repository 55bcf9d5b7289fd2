"""`xelm nearest`: relatives of a language by several measures, with the text there is of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clustering.distances import Relative
from clustering.errors import UserError
from clustering.languages import canonical, canonical_all, english_name
from xelm.runs.distances import Sources, languages_of, measured
from xelm.runs.run import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Relatives:
    """How one other language is related."""

    language: str
    """Canonical tag."""
    by_measure: Mapping[str, Relative]
    """Measure -> distance and coverage."""
    tokens: int | None
    """In the RUN's corpus, or in what a grown expert was trained on; None without a RUN."""
    expert: str | None
    """Who serves the language in the RUN, as `name@version`; None where nobody does."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        measures = {
            name: {"distance": found.distance, "coverage": found.coverage}
            for name, found in self.by_measure.items()
        }
        return {
            "language": self.language,
            "name": english_name(self.language),
            **measures,
            "tokens": self.tokens,
            "expert": self.expert,
        }


def relatives(
    language: str,
    measures: Sequence[str],
    sources: Sources,
    others: Sequence[str] | None = None,
) -> list[Relatives]:
    """The other languages, nearest first by the first of the measures. others: None takes those of
    the sources. UserError as `distances.measured`."""
    tag = canonical(language)
    if not measures:
        raise UserError("name a measure at least")
    given = languages_of("+".join(measures), sources) if others is None else others
    known = [other for other in canonical_all(given) if other != tag]
    if not known:
        raise UserError(f"no language to compare {tag} with")
    found = {
        measure: {
            near.language: near for near in measured(measure, [tag, *known], sources).relatives(tag)
        }
        for measure in measures
    }
    tokens, experts = ({}, {}) if sources.run is None else _served(sources.run)
    return [
        Relatives(
            language=other,
            by_measure={measure: near[other] for measure, near in found.items()},
            tokens=tokens.get(other),
            expert=experts.get(other),
        )
        for other in found[measures[0]]
    ]


def _served(run: Run) -> tuple[dict[str, int], dict[str, str]]:
    """Tokens of each language of a RUN, and its expert."""
    experts = {tag: e.reference for e in run.registry().published() for tag in e.languages}
    stores = [run.store(), *(run.store(tag) for tag in experts if tag not in run.languages)]
    tokens = {
        tag: counts["tokens"]
        for store in stores
        for tag, counts in store.record["languages"].items()
    }
    return tokens, experts
