"""From what was measured of every document to rows and summaries, with intervals.

Intervals are of a bootstrap over documents (Efron 1979): of each language, as many as there are are
drawn with replacement, the same ones for all systems, so that differences are of the same text.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from xelm.inference.reliability import Reliability
from xelm.runs.results import Calibration, Estimate, Interval, Results, Routed, Row, Summary

DRAWS = 1000
"""Samples that an interval is read off."""
_SEED, _DENSE = ("seed", None), ("dense", None)

System = tuple[str, str | None]
"""Its name and, of an ensemble, the routing."""


class Guessed(NamedTuple):
    """How a system predicted a sample of tokens; those of several languages add up."""

    reliability: Reliability
    """Of the likeliest token."""
    brier: float
    """Summed."""

    def __add__(self, other: "Guessed") -> "Guessed":  # type: ignore[override]
        return Guessed(self.reliability + other.reliability, self.brier + other.brier)

    def calibration(self) -> Calibration:
        """Of all of them."""
        total = self.reliability.total
        return Calibration(
            tokens=total,
            accuracy=self.reliability.accuracy,
            ece=self.reliability.ece,
            brier=self.brier / total,
        )


class Weighed(NamedTuple):
    """How a router weighed experts at some tokens; those of several languages add up."""

    reliability: Reliability
    """Of the largest weight."""
    entropy: float
    """In bits, summed."""
    asked: float
    """Experts, summed."""

    def __add__(self, other: "Weighed") -> "Weighed":  # type: ignore[override]
        return Weighed(
            self.reliability + other.reliability,
            self.entropy + other.entropy,
            self.asked + other.asked,
        )

    def routed(self, regret: float | None) -> Routed:
        """Over all of them."""
        total = self.reliability.total
        return Routed(
            accuracy=self.reliability.accuracy,
            ece=self.reliability.ece,
            entropy=self.entropy / total,
            asked=self.asked / total,
            regret=regret,
        )


@dataclass(kw_only=True, slots=True)
class Measured:
    """Of one system in one language."""

    nats: Float[np.ndarray, " documents"]
    """Of each."""
    guessed: Guessed | None = None
    """Of a sample."""
    weighed: Weighed | None = None
    """Of an ensemble."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expectations:
    """What a RUN says of its systems."""

    experts: Sequence[str]
    """All of the ensemble."""
    languages: Sequence[str]
    """Of the RUN's corpus."""
    trained: Mapping[str, Sequence[str]]
    """Languages that a system was trained on after the seed: of the ensemble, dense, and of experts
    of languages."""
    unspelled: Sequence[str] = ()
    """Languages that the tokenizer cannot spell: likelihoods say nothing there, so that they are in
    no mean."""


def judged(
    measured: Mapping[str, Mapping[System, Measured]],
    tokens: Mapping[str, Int[np.ndarray, " documents"]],
    sizes: Mapping[str, Int[np.ndarray, " documents"]],
    expected: Expectations,
) -> Results:
    """By language: what was measured of each system, and of each document the tokens that are
    predicted and its bytes."""
    rows: dict[System, list[Row]] = {}
    samples: dict[tuple[System, str], np.ndarray] = {}
    for tag, found in measured.items():
        nats = [one.nats for one in found.values()]
        sums = _resampled(np.stack([*nats, tokens[tag], sizes[tag]]), zlib.crc32(tag.encode()))
        sums[-1] = np.maximum(sums[-1], 1)  # where only empty documents were drawn
        total = int(sizes[tag].sum())
        best = [found[name, None].nats.sum() for name in expected.experts if (name, None) in found]
        known = len(best) == len(expected.experts)
        for number, (system, one) in enumerate(found.items()):
            nll = float(one.nats.sum())
            regret = (nll - min(best)) / math.log(2) / total if best and known else None
            samples[system, tag] = sums[number] / np.log(2) / sums[-1]
            row = Row(
                system=system[0],
                routing=system[1],
                language=tag,
                documents=len(one.nats),
                tokens=int(tokens[tag].sum()),
                bytes=total,
                nll=nll,
                perplexity_95=_interval(np.exp(sums[number] / sums[-2]), len(one.nats)),
                bits_per_byte_95=_interval(samples[system, tag], len(one.nats)),
                calibration=one.guessed and one.guessed.calibration(),
                router=one.weighed and one.weighed.routed(regret),
            )
            rows.setdefault(system, []).append(row)
    measured = {tag: found for tag, found in measured.items() if tag not in expected.unspelled}
    by_key = {
        (system, row.language): row
        for system, some in rows.items()
        for row in some
        if row.language in measured
    }
    judge = _Judge(rows=by_key, samples=samples, measured=measured, expected=expected)
    return Results(
        rows=[row for some in rows.values() for row in some],
        summaries=[s for s in map(judge.summary, rows) if s is not None],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Judge:
    rows: Mapping[tuple[System, str], Row]
    samples: Mapping[tuple[System, str], Float[np.ndarray, " DRAWS"]]
    measured: Mapping[str, Mapping[System, Measured]]
    expected: Expectations

    def summary(self, system: System) -> Summary | None:
        """None of a system that was scored on no language of the RUN's corpus."""
        common = [tag for tag in self.expected.languages if tag in self.measured]
        shared = [
            tag
            for tag in common
            if all(
                other in self.measured[tag]
                for other in dict.fromkeys(other for other, _ in self.rows)
                if other[0] not in self.expected.experts
            )
        ]
        mine = [tag for tag in shared if (system, tag) in self.rows]
        mine = mine or [tag for tag in common if (system, tag) in self.rows]
        if not mine:
            return None
        parts = [self.measured[tag][system] for tag in mine]
        guessed = [part.guessed for part in parts if part.guessed is not None]
        weighed = [part.weighed for part in parts if part.weighed is not None]
        regrets = [row.router.regret for tag in mine if (row := self.rows[system, tag]).router]
        known = [regret for regret in regrets if regret is not None]
        regret = float(np.mean(known)) if known and len(known) == len(regrets) else None
        return Summary(
            system=system[0],
            routing=system[1],
            languages=mine,
            perplexity=float(np.mean([self.rows[system, tag].perplexity for tag in mine])),
            bits_per_byte=self._mean(mine, lambda tag: self._bits(system, tag)),
            above_dense=self._above(system, _DENSE, mine),
            forgetting=self._forgetting(system, common),
            transfer_gap=self._transfer_gap(system),
            calibration=_summed(guessed).calibration() if guessed else None,
            router=_summed(weighed).routed(regret) if weighed else None,
        )

    def _forgetting(self, system: System, common: Sequence[str]) -> Estimate | None:
        own = self.expected.trained.get(system[0])
        if own is None or system[0] not in self.expected.experts:
            return None
        return self._above(system, _SEED, [tag for tag in common if tag not in own])

    def _transfer_gap(self, system: System) -> Estimate | None:
        own, mine = self.expected.trained.get(system[0]), [t for s, t in self.rows if s == system]
        mine = [tag for tag in mine if (_SEED, tag) in self.rows]
        groups = own and [[t for t in mine if t in own], [t for t in mine if t not in own]]
        if not groups or not all(groups):
            return None
        inside, outside = (
            np.mean([self._saved(system, tag) for tag in tags], axis=0) for tags in groups
        )
        return self._estimate(inside - outside, mine)

    def _above(self, system: System, other: System, tags: Sequence[str]) -> Estimate | None:
        """Bits per byte more than another takes."""
        if system == other or not tags:
            return None
        if any((s, tag) not in self.rows for s in (system, other) for tag in tags):
            return None
        return self._mean(tags, lambda tag: self._bits(system, tag) - self._bits(other, tag))

    def _bits(self, system: System, tag: str) -> np.ndarray:
        """Per byte: the value, then those of samples."""
        value = self.rows[system, tag].bits_per_byte
        return np.concatenate([[value], self.samples[system, tag]])

    def _saved(self, system: System, tag: str) -> np.ndarray:
        return 1 - self._bits(system, tag) / self._bits(_SEED, tag)

    def _mean(self, tags: Sequence[str], of: Callable[[str], np.ndarray]) -> Estimate:
        """Over languages, each of which is the value and its samples."""
        return self._estimate(np.mean([of(tag) for tag in tags], axis=0), tags)

    def _estimate(self, found: np.ndarray, tags: Sequence[str]) -> Estimate:
        documents = min(len(next(iter(self.measured[tag].values())).nats) for tag in tags)
        return Estimate(float(found[0]), _interval(found[1:], documents))


def _summed(parts):
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _resampled(values: Float[np.ndarray, "S documents"], seed: int) -> Float[np.ndarray, "S DRAWS"]:
    """Sums over documents drawn with replacement."""
    draw, count = np.random.default_rng(seed), values.shape[1]
    times = (np.bincount(draw.integers(count, size=count), minlength=count) for _ in range(DRAWS))
    return np.stack([values @ some for some in times], axis=1)


def _interval(samples: np.ndarray, documents: int) -> Interval | None:
    if documents < 2:
        return None
    low, high = np.percentile(samples, [2.5, 97.5]).tolist()
    return low, high
