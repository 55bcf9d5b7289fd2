"""Routers: how much each expert speaks at each token, from what came before it.

A router makes one `Route` for a document or a prompt; a route gives weights for all positions of a
known text at once, or token by token while a text grows. Both ways agree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int
from scipy.special import logsumexp

from clustering.errors import UserError
from clustering.languages import canonical
from clustering.vectoriser import Vectoriser


class Route(Protocol):
    """The weights of E experts along one text."""

    def along(
        self, ids: Int[np.ndarray, " T"], scores: Float[np.ndarray, "E T"]
    ) -> Float[np.ndarray, "T E"]:
        """Log weights, normalised, before each of the tokens `ids`; `scores` are the experts' log
        probabilities of those tokens, of which position t uses only the columns before t."""
        ...

    def now(self) -> Float[np.ndarray, " E"]:
        """Log weights, normalised, for the next token."""
        ...

    def observe(self, token: int, scores: Float[np.ndarray, " E"]) -> None:
        """Takes the next token into account, with the experts' log probabilities of it (-inf or
        nan where an expert was not asked)."""
        ...


class Router(Protocol):
    """Makes routes."""

    @property
    def needs_scores(self) -> bool:
        """Whether every expert must be asked at every token."""
        ...

    def route(self, language: str | None) -> Route:
        """A route for a text in `language`, if that is known."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """The same weights everywhere; `uniform` and `by_language` make them."""

    log_weights: Float[np.ndarray, " E"]
    """Normalised."""

    def along(self, ids, scores):
        return np.broadcast_to(self.log_weights, (len(ids), len(self.log_weights)))

    def now(self):
        return self.log_weights

    def observe(self, token, scores):
        pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Uniform:
    """Equal weights for all experts."""

    experts: int
    """E."""
    needs_scores: bool = False

    def route(self, language: str | None) -> Route:
        return Fixed(log_weights=np.full(self.experts, -np.log(self.experts)))


@dataclass(frozen=True, kw_only=True, slots=True)
class ByLanguage:
    """All weight to the expert that serves the language of the text."""

    experts: int
    """E."""
    serving: Mapping[str, int]
    """Canonical tag of a language -> expert."""
    needs_scores: bool = False

    def route(self, language: str | None) -> Route:
        if language is None:
            raise UserError("routing by language needs the language of the text; give --language")
        tag = canonical(language)
        if tag not in self.serving:
            raise UserError(
                f"no expert serves {language!r}; served: {', '.join(sorted(self.serving))}. "
                "Grow one, or use another routing"
            )
        weights = np.full(self.experts, -np.inf)
        weights[self.serving[tag]] = 0.0
        return Fixed(log_weights=weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tfidf:
    """w_j ~ exp(-||h(x_<t) - c_j||^distance_power / temperature) (X-ELM section 3.3, after
    Gururangan et al. 2023). The authors' code squares the squared distance: distance_power 4."""

    vectoriser: Vectoriser
    """Ids to vectors."""
    centres: Float[np.ndarray, "E D"]
    """Where each expert's training documents lie."""
    temperature: float = 0.1
    """Small trusts the nearest centre alone; .1 in the authors' code."""
    distance_power: float = 2.0
    """Exponent of the distance."""
    needs_scores: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(
                f"the temperature of TF-IDF routing must be above 0; got {self.temperature}"
            )

    def route(self, language: str | None) -> Route:
        return _TfidfRoute(self)

    def log_weights(self, vectors: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "T E"]:
        """Of unit (or zero) vectors."""
        squared = (
            np.square(vectors).sum(axis=1, keepdims=True)
            - 2 * vectors @ self.centres.T
            + np.square(self.centres).sum(axis=1)
        )
        distance = np.maximum(squared, 0.0) ** (self.distance_power / 2)
        # Before the first known term nothing speaks for any expert, not even a centre near zero.
        distance = np.where(vectors.any(axis=1, keepdims=True), distance, 0.0)
        return _normalised(-distance / self.temperature)


class _TfidfRoute:
    """Keeps the running sum, so that a new token costs O(D E)."""

    def __init__(self, router: Tfidf):
        self.router = router
        self.sum = np.zeros(router.centres.shape[1])

    def along(self, ids, scores):
        return self.router.log_weights(self.router.vectoriser.prefix(np.asarray(ids)))

    def now(self):
        norm = np.linalg.norm(self.sum)
        vector = self.sum / norm if norm > 0 else self.sum
        return self.router.log_weights(vector[None])[0]

    def observe(self, token, scores):
        vectoriser = self.router.vectoriser
        self.sum = self.sum + vectoriser.idf[token].astype(float) * vectoriser.projection[token]


@dataclass(frozen=True, kw_only=True, slots=True)
class Posterior:
    """w_j ~ prior_j * prod p_j(x_<t): Bayes' rule over the experts. Asks every expert."""

    prior: Float[np.ndarray, " E"]
    """Log prior, normalised."""
    needs_scores: bool = True

    def route(self, language: str | None) -> Route:
        return _PosteriorRoute(self.prior)


class _PosteriorRoute:
    def __init__(self, prior):
        self.joint = prior.astype(float)

    def along(self, ids, scores):
        before = np.cumsum(scores, axis=1)[:, :-1]
        return _normalised((self.joint[:, None] + np.pad(before, ((0, 0), (1, 0)))).T)

    def now(self):
        return _normalised(self.joint)

    def observe(self, token, scores):
        self.joint = self.joint + scores


def keep_largest(
    log_weights: Float[np.ndarray, "*T E"], count: int | None
) -> Float[np.ndarray, "*T E"]:
    """The `count` largest weights of each row, normalised again; the first of equals wins. None
    keeps all."""
    experts = log_weights.shape[-1]
    if count is None or count >= experts:
        return log_weights
    order = np.argsort(-log_weights, axis=-1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(experts), order.shape), axis=-1)
    return _normalised(np.where(ranks < count, log_weights, -np.inf))


def mixture(
    log_weights: Float[np.ndarray, "T E"], scores: Float[np.ndarray, "E T"]
) -> Float[np.ndarray, " T"]:
    """log sum_j w_j p_j at each token: a mixture of probabilities, in log space."""
    return np.asarray(logsumexp(log_weights + scores.T, axis=1))


ROUTINGS: Sequence[str] = ("language", "tfidf", "uniform", "posterior")


def _normalised(log_weights):
    return log_weights - logsumexp(log_weights, axis=-1, keepdims=True)
