"""What a server tells Prometheus. Nothing of what was asked or said."""

import math
from collections.abc import Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from clustering.languages import lookup
from xelm.inference.parameter_cache import ParameterCache
from xelm.serving.desk import Desk, Ended

disable_created_metrics()  # a second series for each, of when it began

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BITS = (0.01, 0.03, 0.1, 0.3, 1, 2, 3, 4, 6)


class Metrics:
    """Counters of one server."""

    def __init__(self, desk: Desk):
        registry = CollectorRegistry()
        self._desk, self._registry = desk, registry
        self._requests = Counter(
            "xelm_requests",
            "Requests, by model and HTTP status.",
            ["model", "status"],
            registry=registry,
        )
        self._tokens = Counter("xelm_tokens", "Tokens read and drawn.", ["kind"], registry=registry)
        desk.count = lambda kind, tokens: self._tokens.labels(kind).inc(tokens)
        self._first = Histogram(
            "xelm_first_token_seconds",
            "From a request to its first piece.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._whole = Histogram(
            "xelm_request_seconds",
            "From a request to its end.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._weights = Counter(
            "xelm_routing_weight",
            "Tokens drawn from the ensemble, by language of the text and the share that each model "
            "had in them.",
            ["language", "model"],
            registry=registry,
        )
        self._entropy = Histogram(
            "xelm_routing_entropy_bits",
            "Entropy of the mean weights of each continuation by the ensemble.",
            buckets=_BITS,
            registry=registry,
        )
        self._reloads = Counter(
            "xelm_reloads",
            "Changes of the registry that were taken up or refused.",
            ["result"],
            registry=registry,
        )
        preparing = Gauge(
            "xelm_preparing",
            "1 while a changed registry is prepared: files checked, routers fitted.",
            registry=registry,
        )
        preparing.set_function(lambda: float(desk.preparing))
        texts = Gauge(
            "xelm_texts", "Texts that are continued or wait.", ["state"], registry=registry
        )
        texts.labels("running").set_function(lambda: desk.running)
        texts.labels("waiting").set_function(lambda: desk.waiting)
        held = Gauge("xelm_models_held", "Models in memory.", ["place"], registry=registry)
        held.labels("device").set_function(lambda: len(_parameter_cache(desk).on_device))
        held.labels("host").set_function(lambda: len(_parameter_cache(desk).on_host))

    def request(self, model: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(model, str(status)).inc()

    def began(self, seconds: float) -> None:
        """A request had its first piece."""
        self._first.observe(seconds)

    def ended(self, seconds: float) -> None:
        """A request was answered to its end."""
        self._whole.observe(seconds)

    def routed(self, language: str | None, end: Ended) -> None:
        """The ensemble continued a text, or only read it."""
        if not end.tokens:
            return
        # Whatever requests say of their language: as many labels as languages here, and one.
        known = self._desk.offer.detector.identifier.languages
        language = (language and lookup(language, known)) or "other"
        for model, weight in end.weights.items():
            self._weights.labels(language, model).inc(weight * end.tokens)
        self._entropy.observe(entropy(end.weights))

    def reloaded(self, result: str) -> None:
        """The registry changed."""
        self._reloads.labels(result).inc()

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)


def entropy(weights: Mapping[str, float]) -> float:
    """In bits."""
    return sum(-w * math.log2(w) for w in weights.values() if w > 0)


def _parameter_cache(desk: Desk) -> ParameterCache:
    held = desk.offer.ensemble.parameters
    assert isinstance(held, ParameterCache)
    return held
