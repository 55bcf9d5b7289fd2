"""Reliability of choices: how confident each was, and how often it was right."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

BINS = 15
"""Number of bins of confidence, of equal width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reliability:
    """Choices by their confidence: the sums that the expected calibration error is computed of (Guo
    et al. 2017, arXiv 1706.04599, equation 3). Those of several texts add up."""

    counts: Float[np.ndarray, " BINS"]
    """Number of choices in each bin of confidence."""
    confidence: Float[np.ndarray, " BINS"]
    """Sum of their confidences."""
    correct: Float[np.ndarray, " BINS"]
    """Number of choices in each bin that were right."""

    @classmethod
    def of(
        cls, confidence: Float[np.ndarray, " N"], correct: Float[np.ndarray, " N"]
    ) -> "Reliability":
        """Choices by their probabilities. correct: 1, 0, or a fraction where some are equal."""
        bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        counts, sums, right = (
            np.bincount(bins, weights, BINS) for weights in (None, confidence, correct)
        )
        return cls(counts=counts.astype(float), confidence=sums, correct=right)

    def __add__(self, other: "Reliability") -> "Reliability":
        return Reliability(
            counts=self.counts + other.counts,
            confidence=self.confidence + other.confidence,
            correct=self.correct + other.correct,
        )

    @property
    def total(self) -> int:
        """Number of choices."""
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """Share of the choices that were right."""
        return float(self.correct.sum() / self.counts.sum())

    @property
    def ece(self) -> float:
        """Expected calibration error: mean distance of confidence and accuracy, by bin."""
        return float(np.abs(self.confidence - self.correct).sum() / self.counts.sum())


def chosen(
    weights: Float[np.ndarray, "N E"], wanted: int
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """The largest weight of each row, and 1 if it is that of `wanted`, else 0 (1/n of n equal)."""
    largest = weights.max(axis=1)
    equal: Bool[Any, "N E"] = weights == largest[:, None]
    return largest, equal[:, wanted] / equal.sum(axis=1)
