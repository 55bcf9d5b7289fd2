"""Bootstrap over documents: intervals of sums and of their ratios (Efron 1979). All systems share
draws, so that differences between systems are differences on the same text."""

import zlib

import numpy as np
from jaxtyping import Float

from xelm.evaluation.results import Interval

DRAWS = 1000
"""Number of samples that an interval is read off."""


def resampled(
    values: Float[np.ndarray, "S documents"], language: str
) -> Float[np.ndarray, "S DRAWS"]:
    """Sums of S values over documents drawn with replacement; `language` is the random seed."""
    draw, count = np.random.default_rng(zlib.crc32(language.encode())), values.shape[1]
    times = (np.bincount(draw.integers(count, size=count), minlength=count) for _ in range(DRAWS))
    return np.stack([values @ some for some in times], axis=1)


def interval(samples: Float[np.ndarray, " DRAWS"], documents: int) -> Interval | None:
    """The 95 % interval of samples; None for a single document, which has no variation."""
    if documents < 2:
        return None
    low, high = np.percentile(samples, [2.5, 97.5]).tolist()
    return low, high
