"""Routers: how much each expert speaks at each token, from what came before it.

Every router is a running sum: a text has a state, a vector; each token adds a term to it; and the
weights are a function of the state. So the weights of all positions of a known text come from one
cumulative sum, those of a growing text cost one term a token, and both ways agree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from clustering.errors import UserError
from clustering.languages import canonical
from clustering.vectoriser import Vectoriser


class Router(Protocol):
    """Weighs E experts by states of Z numbers."""

    @property
    def needs_scores(self) -> bool:
        """Whether every expert must be asked at every token."""
        ...

    @property
    def memory(self) -> float:
        """What is left of a state after one more token, before that adds its term; 1 is all."""
        ...

    def start(self, language: str | None) -> Float[np.ndarray, " Z"]:
        """The state of a text that has not begun, in `language`, if that is known."""
        ...

    def terms(
        self, ids: Int[np.ndarray, " T"], scores: Float[np.ndarray, "E T"] | None
    ) -> Float[np.ndarray, "T Z"]:
        """What each token adds; `scores` are the experts' log probabilities of it, if needed."""
        ...

    def log_weights(self, states: Float[np.ndarray, "T Z"]) -> Float[np.ndarray, "T E"]:
        """Normalised."""
        ...


def states_along(
    router: Router,
    start: Float[np.ndarray, " Z"],
    ids: Int[np.ndarray, " T"],
    scores: Float[np.ndarray, "E T"] | None = None,
) -> Float[np.ndarray, "T1 Z"]:
    """The state before each token of a text and, as the last row, after all of them."""
    terms = np.concatenate([start[None], router.terms(ids, scores)])
    if router.memory == 1:
        return np.cumsum(terms, axis=0)
    for position in range(1, len(terms)):
        terms[position] += router.memory * terms[position - 1]
    return terms


def weights_along(
    router: Router,
    start: Float[np.ndarray, " Z"],
    ids: Int[np.ndarray, " T"],
    scores: Float[np.ndarray, "E T"] | None,
    top_m: int | None = None,
) -> Float[np.ndarray, "T E"]:
    """Log weights of the `top_m` largest experts before each token of a text."""
    states = states_along(router, start, ids, scores)
    return keep_largest(router.log_weights(states[:-1]), top_m)


@dataclass(frozen=True, kw_only=True, slots=True)
class Uniform:
    """Equal weights for all experts."""

    experts: int
    """E."""
    needs_scores: bool = False
    memory: float = 1.0

    def start(self, language):
        return np.zeros(0)

    def terms(self, ids, scores):
        return np.zeros((len(ids), 0))

    def log_weights(self, states):
        return np.full((len(states), self.experts), -np.log(self.experts))


@dataclass(frozen=True, kw_only=True, slots=True)
class ByLanguage:
    """All weight to the expert that serves the language of the text."""

    experts: int
    """E."""
    serving: Mapping[str, int]
    """Canonical tag of a language -> expert."""
    needs_scores: bool = False
    memory: float = 1.0

    def start(self, language):
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
        return weights

    def terms(self, ids, scores):
        return np.zeros((len(ids), self.experts))

    def log_weights(self, states):
        return states


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
    memory: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(
                f"the temperature of TF-IDF routing must be above 0; got {self.temperature}"
            )

    def start(self, language):
        return np.zeros(self.vectoriser.dimensions)

    def terms(self, ids, scores):
        return self.vectoriser.terms(ids)

    def log_weights(self, states):
        vectors = unit(states)
        squared = (
            np.square(vectors).sum(axis=1, keepdims=True)
            - 2 * vectors @ self.centres.T
            + np.square(self.centres).sum(axis=1)
        )
        distance = np.maximum(squared, 0.0) ** (self.distance_power / 2)
        # Before the first known term nothing speaks for any expert, not even a centre near zero.
        distance = np.where(vectors.any(axis=1, keepdims=True), distance, 0.0)
        return _normalised(-distance / self.temperature)


@dataclass(frozen=True, kw_only=True, slots=True)
class Posterior:
    """w_j ~ prior_j * prod p_j(x_<t): Bayes' rule over the experts. Asks every expert."""

    prior: Float[np.ndarray, " E"]
    """Log prior, normalised."""
    memory: float = 1.0
    """Below 1 it forgets: a token counts by this to the power of how far it lies back, and so does
    the prior."""
    needs_scores: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.memory <= 1:
            raise UserError(f"a memory must be above 0 and at most 1; got {self.memory}")

    def start(self, language):
        return self.prior.astype(float)

    def terms(self, ids, scores):
        return scores.T.astype(float)

    def log_weights(self, states):
        return _normalised(states)


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
    return _logsumexp(log_weights + scores.T)[:, 0]


ROUTINGS: Sequence[str] = ("language", "tfidf", "uniform", "posterior")


def unit(vectors: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "T D"]:
    """Vectors of length one; zero stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def _normalised(log_weights):
    return log_weights - _logsumexp(log_weights)


def _logsumexp(values):
    """Over the last axis, kept. Some of each row are finite. (SciPy's takes ten times as long on
    the few experts of a token.)"""
    top = values.max(axis=-1, keepdims=True)
    return top + np.log(np.exp(values - top).sum(axis=-1, keepdims=True))
