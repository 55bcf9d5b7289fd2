"""Defaults of an evaluation. Imports nothing, so that the command line starts quickly."""

from collections.abc import Sequence

EVALUATED: Sequence[str] = ("language", "detected", "tfidf", "learned", "posterior")
"""Routings that are evaluated unless others are given."""
CALIBRATION_TOKENS = 1000
"""Tokens of each language on which calibration is measured unless another number is given."""
