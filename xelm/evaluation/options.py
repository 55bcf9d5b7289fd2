"""Options of an evaluation, as plain values. Imports nothing heavy, so that flags can be made of
them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clustering.errors import UserError
from xelm.inference.routing import ROUTINGS, Routing, RoutingLimits
from xelm.models.config import WEIGHTS_DTYPES, WeightsDtype

EVALUATED: Sequence[str] = ("language", "detected", "tfidf", "learned", "posterior")
"""Routings that are evaluated unless others are given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationOptions:
    """How a RUN is evaluated."""

    routings: Sequence[str] = EVALUATED
    """Routings to measure, of language, detected, tfidf, learned, posterior, uniform; only language
    is the quickest."""
    max_documents: int | None = None
    """Largest number of documents of each language to score, the first in the corpus. None: all."""
    calibration_tokens: int = 1000
    """Number of tokens of each language on which calibration is measured."""
    context_length: int | None = None
    """Number of tokens that a model reads at once. None: the models' context length."""
    stride: int | None = None
    """Number of tokens from one window of a longer document to the next; a small one gives every
    token more context and takes longer. None: the context length."""
    top_m: int | None = None
    """Largest number of experts whose predictions are mixed at each token, those with the largest
    weights. None: all that have weight."""
    least_weight: float = 0.001
    """Weight below which an expert is left out of the mixture; 0 keeps all that have any weight."""
    temperature: float | None = None
    """Temperature of TF-IDF routing; a low one trusts the nearest expert alone. None: 0.1."""
    dtype: WeightsDtype = "float32"
    """Data type of the weights in memory."""

    def __post_init__(self) -> None:
        if "fixed" in self.routings:
            raise UserError(f"evaluate knows the routings {', '.join(ROUTINGS[:-1])}; got fixed")
        _ = self.routing  # made to be checked
        if self.dtype not in WEIGHTS_DTYPES:
            known = ", ".join(WEIGHTS_DTYPES)
            raise UserError(f"dtype must be one of {known}; got {self.dtype}")
        if self.max_documents is not None and self.max_documents < 1:
            raise UserError(f"max_documents must be at least 1; got {self.max_documents}")
        if self.calibration_tokens < 0:
            raise UserError(f"calibration_tokens must be at least 0; got {self.calibration_tokens}")
        if self.temperature is not None and "tfidf" not in self.routings:
            raise UserError(
                "a router's temperature goes with routing tfidf, which is not evaluated"
            )

    @property
    def routing(self) -> list[Routing]:
        """The options of each router, in the given order."""
        temperatures = {"tfidf": self.temperature}
        return [
            Routing(name=name, least_weight=self.least_weight, temperature=temperatures.get(name))
            for name in self.routings
        ]

    @property
    def limits(self) -> RoutingLimits:
        """Which of the weighed experts are kept at each token."""
        return RoutingLimits(top_m=self.top_m, least_weight=self.least_weight)

    @property
    def windows(self) -> tuple[int, int]:
        """Context length and stride, in tokens, once the context length is known."""
        assert self.context_length is not None
        return self.context_length, self.context_length if self.stride is None else self.stride

    def to_json(self) -> dict[str, Any]:
        """The options as in results.json."""
        return {**asdict(self), "routings": list(self.routings), "stride": self.windows[1]}
