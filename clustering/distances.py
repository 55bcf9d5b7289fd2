"""Distances between languages by some measure, and weighted means of several measures.

Every measure (`typology`, `genealogy`, `geography`, `table`, `lexical`, `internal`) returns
`Distances`: values and coverage by pair, and where they come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from clustering.errors import UserError
from clustering.languages import canonical_all, find
from clustering.values import ArrayValue

_MOST_SHOWN = 12
"""Number of languages up to which `repr` shows the values."""


class Relative(NamedTuple):
    """Another language, with its distance."""

    language: str
    distance: float
    """As in `Distances.values`; NaN if it is unknown."""
    coverage: float
    """As in `Distances.coverage`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Distances(ArrayValue):
    """Distances between languages by one measure; immutable."""

    measure: str
    """Name of the measure, as figures show it: `typology`, `.7 typology + .3 genealogy`."""
    languages: tuple[str, ...]
    """Canonical tags; rows and columns of the arrays."""
    values: Float[np.ndarray, "languages languages"]
    """Distances: symmetric, 0 on the diagonal, never negative, NaN if unknown. Each measure says
    what 1 is: the largest possible distance, or the largest of these."""
    coverage: Float[np.ndarray, "languages languages"]
    """Share of the features, or whatever is compared, that is known for both languages, 0..1; on
    the diagonal, for each. It is 0 where a distance is unknown or comes from predictions alone."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """The arguments of the measure and what it reports, as JSON values."""
    made_from: dict[str, str] = field(default_factory=dict)
    """Name of an input -> its SHA-256 or version."""

    def __post_init__(self) -> None:
        count = len(self.languages)
        for name in ("values", "coverage"):
            array = getattr(self, name)
            if array.shape != (count, count) or not np.array_equal(array, array.T, equal_nan=True):
                raise ValueError(f"{name} must be symmetric, [{count}, {count}]")
        covered = (self.coverage >= 0) & (self.coverage <= 1)
        if np.isinf(self.values).any() or not covered.all():
            raise ValueError("distances must be finite or NaN, and coverage between 0 and 1")
        if self.coverage[np.isnan(self.values)].any():
            raise ValueError("coverage must be 0 where a distance is NaN")
        if (self.values < 0).any() or np.diagonal(self.values).any():
            raise ValueError("distances must not be negative, and 0 from a language to itself")

    def __repr__(self) -> str:
        count = len(self.languages)
        title = f"{self.measure}: distances of {count} languages"
        if count > _MOST_SHOWN:
            return title
        width = max(map(len, self.languages)) + 1
        lines = [title, " " * width + "".join(f"{tag:>7}" for tag in self.languages)]
        for tag, row in zip(self.languages, self.values):
            lines.append(f"{tag:<{width}}" + "".join(f"{value:>7.3f}" for value in row))
        return "\n".join(lines)

    def between(self, one: str, other: str) -> float:
        """The distance between two languages, given by any of their codes."""
        return float(self.values[self._at(one), self._at(other)])

    def of(self, languages: Sequence[str]) -> "Distances":
        """The distances of these languages alone, in this order; UserError for an unknown one."""
        for language in languages:
            self._at(language)
        return self.spread(languages)

    def spread(self, languages: Sequence[str]) -> "Distances":
        """The distances of these languages, in this order; unknown where a language is not among
        `self.languages`."""
        tags = canonical_all(languages)
        known = [place for place, tag in enumerate(tags) if tag in self.languages]
        index = [self.languages.index(tags[place]) for place in known]
        values = np.full((len(tags),) * 2, np.nan)
        np.fill_diagonal(values, 0.0)
        coverage = np.zeros_like(values)
        values[np.ix_(known, known)] = self.values[np.ix_(index, index)]
        coverage[np.ix_(known, known)] = self.coverage[np.ix_(index, index)]
        return replace(self, languages=tags, values=values, coverage=coverage)

    def relatives(self, language: str) -> list[Relative]:
        """The other languages, nearest first, and of equals in the order of `self.languages`; those
        at an unknown distance come last."""
        row = self._at(language)
        order = np.argsort(self.values[row], kind="stable")
        return [
            Relative(self.languages[i], float(self.values[row, i]), float(self.coverage[row, i]))
            for i in order
            if i != row
        ]

    def complete(self) -> "Distances":
        """These distances, if all are known; else UserError with the pairs and languages that are
        not."""
        unknown = np.isnan(self.values)
        if unknown.any():
            raise UserError(f"{self.measure} knows nothing of {self._named(unknown)}")
        return self

    def without_gaps(self) -> tuple["Distances", tuple[str, ...]]:
        """The distances of languages among which every pair is known, and the languages left out.

        Languages are left out one after another: each time the one with most unknown pairs, and of
        equals the one with the lower coverage."""
        unknown = np.isnan(self.values)
        own = np.diagonal(self.coverage) / 2
        kept = np.ones(len(self.languages), bool)
        while (gaps := (unknown & kept & kept[:, None]).sum(axis=1)).any():
            kept[(gaps - own).argmax()] = False
        tags = [tag for tag, keep in zip(self.languages, kept) if keep]
        return self.of(tags), tuple(tag for tag in self.languages if tag not in tags)

    def _at(self, language: str) -> int:
        tag = find(language, self.languages)
        if tag is None:
            known = ", ".join(self.languages)
            raise UserError(f"{language} is not among the languages of this measure: {known}")
        return self.languages.index(tag)

    def _named(self, pairs: np.ndarray) -> str:
        """Names of the first five pairs that are true in a symmetric [languages, languages]; a
        language without any coverage stands for all of its pairs."""
        alone = np.flatnonzero(np.diagonal(self.coverage) == 0)
        rows, columns = np.nonzero(np.triu(pairs, k=1))
        tags = self.languages
        named = [tags[i] for i in alone]
        named += [f"{tags[i]}-{tags[j]}" for i, j in zip(rows, columns) if not {i, j} & {*alone}]
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        return ", ".join(named[:5]) + more


def combine(parts: Sequence[tuple[Distances, float]]) -> Distances:
    """The weighted mean of several measures of the same languages.

    Each measure is first divided by its largest distance, so that weights compare like with like;
    1 is the largest distance by all measures. Where a measure has no distance, `_typical` stands
    for it, so that a gap makes languages neither near nor distant; a pair unknown to all measures
    stays unknown. Coverage is the weighted mean, in which gaps count 0."""
    weights = [weight for _, weight in parts]
    if not weights or min(weights) < 0 or not sum(weights):
        raise UserError(f"weights must not be negative nor all zero; got {weights}")
    languages = parts[0][0].languages
    for measure, _ in parts:
        if apart := sorted(set(measure.languages) ^ set(languages)):
            raise UserError(
                f"{parts[0][0].measure} and {measure.measure} have different languages: "
                f"{', '.join(apart[:5])}"
            )
    aligned = [measure.of(languages) for measure, _ in parts]
    shares = np.asarray(weights, float) / sum(weights)
    scaled = [m.values / (float(np.nanmax(m.values, initial=0.0)) or 1.0) for m in aligned]
    informed = [(share, values) for share, values in zip(shares, scaled) if _any_known(values)]
    values = sum((s * _typical(v) for s, v in informed), np.zeros_like(scaled[0]))
    values /= sum(share for share, _ in informed) or 1.0
    values[np.all([np.isnan(v) for v in scaled], axis=0)] = np.nan
    return Distances(
        measure=" + ".join(f"{s:.2g} {m.measure}" for s, m in zip(shares, aligned)),
        languages=languages,
        values=values,
        coverage=np.minimum(sum(s * m.coverage for s, m in zip(shares, aligned)), 1.0),
        parameters={
            "combined": [
                {"measure": m.measure, "weight": w, "parameters": m.parameters}
                for w, m in zip(weights, aligned)
            ]
        },
        made_from={name: value for m in aligned for name, value in m.made_from.items()},
    )


def _any_known(values: np.ndarray) -> bool:
    """Whether any two different languages have a known distance."""
    return bool(np.triu(~np.isnan(values), k=1).any()) or len(values) == 1


def _typical(values: Float[np.ndarray, "languages languages"]) -> np.ndarray:
    """The distances with gaps filled by the larger of the pair's mean distances from all others.

    A language without any distance has the mean of all pairs. The reason: a language far from all
    others is likely to be far from an undescribed one too."""
    others = np.where(np.eye(len(values), dtype=bool), np.nan, values)
    known = ~np.isnan(others)
    sums = np.where(known, others, 0.0).sum(axis=1)
    everywhere = sums.sum() / max(known.sum(), 1)
    means = np.where(known.any(axis=1), sums / np.maximum(known.sum(axis=1), 1), everywhere)
    return np.where(np.isnan(values), np.maximum(means[:, None], means), values)
