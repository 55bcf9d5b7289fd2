"""Rows and summaries from what was measured of every document, with intervals."""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Int

from xelm.evaluation.bootstrap import interval, resampled
from xelm.evaluation.reliability import Reliability
from xelm.evaluation.results import (
    DENSE,
    SEED,
    Calibration,
    Estimate,
    Results,
    RouterStats,
    Row,
    Summary,
    System,
)


class CalibrationSums(NamedTuple):
    """Sums over predicted tokens of which calibration is computed; those of languages add up."""

    reliability: Reliability
    """Choices of the likeliest token."""
    brier: float
    """Sum of the Brier scores."""

    def calibration(self) -> Calibration:
        """Means over all these tokens."""
        total = self.reliability.total
        return Calibration(
            tokens=total,
            accuracy=self.reliability.accuracy,
            ece=self.reliability.ece,
            brier=self.brier / total,
        )


class RouterSums(NamedTuple):
    """Sums over routed tokens of which a router's statistics are computed; they add up, too."""

    reliability: Reliability
    """Choices of the expert with the largest weight."""
    entropy: float
    """Sum of the entropies of the weights, in bits."""
    experts_read: float
    """Sum of the numbers of experts that were read."""

    def stats(self, regret: float | None) -> RouterStats:
        """Means over all these tokens."""
        total = self.reliability.total
        return RouterStats(
            accuracy=self.reliability.accuracy,
            ece=self.reliability.ece,
            entropy=self.entropy / total,
            experts_read=self.experts_read / total,
            regret=regret,
        )


Sums = TypeVar("Sums", CalibrationSums, RouterSums)


@dataclass(kw_only=True, slots=True)
class Measurement:
    """What was measured of one system on the documents of one language."""

    nats: Float[np.ndarray, " documents"]
    """Negative log-likelihood of each document."""
    calibration: CalibrationSums | None = None
    """Calibration on a sample of the tokens, if there was a sample."""
    router: RouterSums | None = None
    """Statistics of the router of an ensemble."""
    tokens: Int[np.ndarray, " documents"] | None = None
    """Number of predicted tokens of each document, where the system reads it in pieces of its own;
    None: in those of the seed."""
    routed: Sequence[RouterSums] = ()
    """For an ensemble, the parts of `router`, one for each document."""
    preferred: Int[np.ndarray, " documents"] | None = None
    """For an ensemble, the model with the largest weight after each document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """What summaries must know of the systems, beside their scores."""

    experts: Sequence[str]
    """Names of all experts of the ensemble."""
    languages: Sequence[str]
    """Languages of the RUN's corpus."""
    trained: Mapping[str, Sequence[str]]
    """Languages that a system was trained on after the seed: the ensemble, dense, and experts of
    languages. Experts of clusters of documents are not listed."""
    unspelled: Sequence[str] = ()
    """Languages whose characters the tokenizer does not know; they are in no mean."""


def summarise(
    measured: Mapping[str, Mapping[System, Measurement]],
    tokens: Mapping[str, Int[np.ndarray, " documents"]],
    sizes: Mapping[str, Int[np.ndarray, " documents"]],
    background: Background,
) -> Results:
    """Rows of every system in every language, and the summary of each system.

    measured: language -> system -> what was measured. tokens, sizes: language -> number of
    predicted tokens and of bytes of each document."""
    rows: dict[System, list[Row]] = {}
    by_key: dict[tuple[System, str], Row] = {}
    samples: dict[tuple[System, str], np.ndarray] = {}
    for tag, found in measured.items():
        nats = [one.nats for one in found.values()]
        spelled = [tokens[tag] if one.tokens is None else one.tokens for one in found.values()]
        sums = resampled(np.stack([*nats, *spelled, sizes[tag]]), tag)
        sums[-1] = np.maximum(sums[-1], 1)  # where only empty documents were drawn
        total = int(sizes[tag].sum())
        best = [found[name].nats.sum() for name in map(System, background.experts) if name in found]
        known = len(best) == len(background.experts)
        for number, (system, one) in enumerate(found.items()):
            nll = float(one.nats.sum())
            regret = (nll - min(best)) / math.log(2) / total if best and known else None
            samples[system, tag] = sums[number] / np.log(2) / sums[-1]
            row = Row(
                system=system[0],
                routing=system[1],
                language=tag,
                documents=len(one.nats),
                tokens=int(spelled[number].sum()),
                bytes=total,
                nll=nll,
                perplexity_95=interval(
                    np.exp(sums[number] / sums[len(nats) + number]), len(one.nats)
                ),
                bits_per_byte_95=interval(samples[system, tag], len(one.nats)),
                calibration=one.calibration and one.calibration.calibration(),
                router=one.router and one.router.stats(regret),
            )
            rows.setdefault(system, []).append(row)
            if tag not in background.unspelled:
                by_key[system, tag] = row
    measured = {tag: found for tag, found in measured.items() if tag not in background.unspelled}
    table = _Table(rows=by_key, samples=samples, measured=measured, background=background)
    return Results(
        rows=[row for some in rows.values() for row in some],
        summaries=[s for s in map(table.summary, rows) if s is not None],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    """Everything that summaries are computed from."""

    rows: Mapping[tuple[System, str], Row]
    samples: Mapping[tuple[System, str], Float[np.ndarray, " DRAWS"]]
    measured: Mapping[str, Mapping[System, Measurement]]
    background: Background

    def summary(self, system: System) -> Summary | None:
        """The summary of a system; None if it was scored on no language of the RUN's corpus."""
        common = [tag for tag in self.background.languages if tag in self.measured]
        general = [other for other, _ in self.rows if other[0] not in self.background.experts]
        shared = [tag for tag in common if all(s in self.measured[tag] for s in general)]
        mine = [tag for tag in shared if (system, tag) in self.rows]
        mine = mine or [tag for tag in common if (system, tag) in self.rows]
        if not mine:
            return None
        parts = [self.measured[tag][system] for tag in mine]
        calibration = total_of([part.calibration for part in parts if part.calibration])
        router = total_of([part.router for part in parts if part.router])
        regrets = [row.router.regret for tag in mine if (row := self.rows[system, tag]).router]
        known = [regret for regret in regrets if regret is not None]
        regret = float(np.mean(known)) if known and len(known) == len(regrets) else None
        return Summary(
            system=system[0],
            routing=system[1],
            languages=tuple(mine),
            perplexity=float(np.mean([self.rows[system, tag].perplexity for tag in mine])),
            bits_per_byte=self._mean(mine, lambda tag: self._bits(system, tag)),
            above_dense=self._above(system, DENSE, mine),
            forgetting=self._forgetting(system, common),
            transfer_gap=self._transfer_gap(system),
            calibration=calibration and calibration.calibration(),
            router=router and router.stats(regret),
        )

    def _forgetting(self, system: System, common: Sequence[str]) -> Estimate | None:
        own = self.background.trained.get(system[0])
        if own is None or system[0] not in self.background.experts:
            return None
        return self._above(system, SEED, [tag for tag in common if tag not in own])

    def _transfer_gap(self, system: System) -> Estimate | None:
        own, mine = self.background.trained.get(system[0]), [t for s, t in self.rows if s == system]
        mine = [tag for tag in mine if (SEED, tag) in self.rows]
        groups = own and [[t for t in mine if t in own], [t for t in mine if t not in own]]
        if not groups or not all(groups):
            return None
        inside, outside = (
            np.mean([self._saved(system, tag) for tag in tags], axis=0) for tags in groups
        )
        return self._estimate(inside - outside, mine)

    def _above(self, system: System, other: System, tags: Sequence[str]) -> Estimate | None:
        """Mean of the bits per byte more than another system takes; None if a score lacks."""
        if system == other or not tags:
            return None
        if any((s, tag) not in self.rows for s in (system, other) for tag in tags):
            return None
        return self._mean(tags, lambda tag: self._bits(system, tag) - self._bits(other, tag))

    def _bits(self, system: System, tag: str) -> np.ndarray:
        """Bits per byte of a system in a language, followed by those of the DRAWS samples."""
        value = self.rows[system, tag].bits_per_byte
        return np.concatenate([[value], self.samples[system, tag]])

    def _saved(self, system: System, tag: str) -> np.ndarray:
        return 1 - self._bits(system, tag) / self._bits(SEED, tag)

    def _mean(self, tags: Sequence[str], of: Callable[[str], np.ndarray]) -> Estimate:
        """Mean over languages; `of` gives the value of one, followed by its samples."""
        return self._estimate(np.mean([of(tag) for tag in tags], axis=0), tags)

    def _estimate(self, found: np.ndarray, tags: Sequence[str]) -> Estimate:
        documents = min(len(next(iter(self.measured[tag].values())).nats) for tag in tags)
        return Estimate(float(found[0]), interval(found[1:], documents))


def total_of(parts: Sequence[Sums]) -> Sums | None:
    """The sums of several parts, field by field; None if there are none."""

    def add(one: Any, other: Any) -> Any:
        return type(one)(*map(operator.add, one, other))

    return functools.reduce(add, parts) if parts else None
