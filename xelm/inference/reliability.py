"""How sure somebody was, and how often rightly so. NumPy alone."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

BINS = 15
"""Of confidence, of equal width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reliability:
    """Choices by how sure of them somebody was; those of several texts add up.

    What is added up are the sums that the expected calibration error is made of (Guo et al. 2017,
    arXiv 1706.04599, equation 3), so it is exact however texts are put together.
    """

    counts: Float[np.ndarray, " BINS"]
    """Choices in each bin of confidence."""
    confidence: Float[np.ndarray, " BINS"]
    """Their confidences, summed."""
    correct: Float[np.ndarray, " BINS"]
    """How many of them were right."""

    @classmethod
    def of(
        cls, confidence: Float[np.ndarray, " N"], correct: Float[np.ndarray, " N"]
    ) -> "Reliability":
        """confidence: the probability of each choice. correct: 1 or 0, or a part of 1 of a choice
        between equals."""
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
        """Choices."""
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
    """The largest weight of each row, and whether it is that of `wanted`; among equals a part."""
    largest = weights.max(axis=1)
    equal: Bool[Any, "N E"] = weights == largest[:, None]
    return largest, equal[:, wanted] / equal.sum(axis=1)
