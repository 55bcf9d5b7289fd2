"""Routers: how much each expert speaks at each token, from what came before it.

What a router knows of a text are two running sums: its *state*, to which each token adds a term of
its own, and, if it asks for it, the *evidence*, to which each token adds the log probabilities that
the experts gave it. The weights are a function of both. So those of all positions of a known text
come from one cumulative sum, those of a growing text cost one term a token, and both ways agree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from clustering.errors import UserError
from clustering.identify import Identifier
from clustering.languages import canonical
from clustering.vectoriser import Vectoriser

TEMPERATURE, DISTANCE_POWER = 0.1, 2.0
"""Of TF-IDF routing; the authors' code has .1 and 4."""


class Router(Protocol):
    """Weighs E experts by states of Z numbers."""

    @property
    def experts(self) -> int:
        """E."""
        ...

    @property
    def memory(self) -> float:
        """What is left of the evidence after one more token, before that adds to it; 1 is all."""
        ...

    def start(self, language: str | None) -> Float[np.ndarray, " Z"]:
        """The state of a text that has not begun, in `language`, if that is known."""
        ...

    def terms(
        self, before: Int[np.ndarray, " _"], ids: Int[np.ndarray, " T"]
    ) -> Float[np.ndarray, "T Z"]:
        """What each of these ids adds to the state, after those of the same text `before`."""
        ...

    def asks(self, states: Float[np.ndarray, "T Z"]) -> Bool[np.ndarray, " T"]:
        """Whether the weights depend on the evidence, for which every expert reads the text."""
        ...

    def log_weights(
        self, states: Float[np.ndarray, "T Z"], evidence: Float[np.ndarray, "T E"]
    ) -> Float[np.ndarray, "T E"]:
        """Normalised. The evidence is zero where it was not asked for."""
        ...


def states_along(
    router: Router, start: Float[np.ndarray, " Z"], ids: Int[np.ndarray, " T"]
) -> Float[np.ndarray, "T1 Z"]:
    """The state before each token of a text and, as the last row, after all of them."""
    return np.cumsum(np.concatenate([start[None], router.terms(ids[:0], ids)]), axis=0)


def evidence_along(router: Router, scores: Float[np.ndarray, "E T"]) -> Float[np.ndarray, "T1 E"]:
    """The evidence before each token of a text and after all of them; `scores` are the log
    probabilities of its tokens by the experts."""
    sums = np.concatenate([np.zeros((1, len(scores))), scores.T.astype(float)])
    if router.memory == 1:
        return np.cumsum(sums, axis=0)
    for position in range(1, len(sums)):
        sums[position] += router.memory * sums[position - 1]
    return sums


def weights_along(
    router: Router,
    states: Float[np.ndarray, "T1 Z"],
    scores: Float[np.ndarray, "E T"],
    positions: Int[np.ndarray, " P"],
    top_m: int | None = None,
    least: float = 0.0,
) -> Float[np.ndarray, "P E"]:
    """Log weights before each of these tokens of a text, as `keep_largest` leaves them, with the
    states along it and, where they are asked for, the experts' scores of it."""
    rows = states[positions]
    evidence, asks = np.zeros((len(positions), len(scores))), router.asks(rows)
    if asks.any():
        evidence = evidence_along(router, scores)[positions]
    # Where all are asked for their evidence, leaving some out spares nothing.
    return keep_largest(router.log_weights(rows, evidence), top_m, np.where(asks, 0.0, least))


class _NeverAsks:
    """Knows the weights from the text alone."""

    __slots__ = ()
    memory = 1.0

    def asks(self, states):
        return np.zeros(len(states), bool)


class _Stateless:
    """Hears nothing of the text itself."""

    __slots__ = ()

    def start(self, language):
        return np.zeros(0)

    def terms(self, before, ids):
        return np.zeros((len(ids), 0))


class _SumsVectors:
    """Sums up the TF-IDF vectors of ids."""

    __slots__ = ()
    vectoriser: Vectoriser

    def start(self, language):
        return np.zeros(self.vectoriser.dimensions)

    def terms(self, before, ids):
        # Nothing of ids that no text becomes, for which a model may have rows all the same.
        known = ids < self.vectoriser.vocabulary_size
        return self.vectoriser.terms(np.where(known, ids, 0)) * known[:, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed(_NeverAsks, _Stateless):
    """The same weights everywhere."""

    weights: Float[np.ndarray, " E"]
    """Log weights, normalised."""

    @property
    def experts(self):
        return len(self.weights)

    def log_weights(self, states, evidence):
        return np.tile(self.weights, (len(states), 1))


def uniform(experts: int) -> Fixed:
    """Equal weights for all experts."""
    return Fixed(weights=np.full(experts, -np.log(experts)))


@dataclass(frozen=True, kw_only=True, slots=True)
class ByLanguage(_NeverAsks):
    """All weight to the expert that serves the language of the text, which is given."""

    experts: int
    """E."""
    serving: Mapping[str, int]
    """Canonical tag of a language -> expert."""

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

    def terms(self, before, ids):
        return np.zeros((len(ids), self.experts))

    def log_weights(self, states, evidence):
        return states


@dataclass(frozen=True, kw_only=True, slots=True)
class Detected(_NeverAsks):
    """The probability of each expert's languages, as they are seen in the text."""

    experts: int
    """E."""
    identifier: Identifier
    """Characters to languages."""
    pieces: list[str]
    """The characters of each id, as the identifier was fitted on them."""
    serving: Mapping[str, int]
    """Canonical tag of a language -> expert; what is probably in other languages goes to none in
    particular, and so to all alike."""

    def start(self, language):
        """Of a language that is given, as if it had been seen for long."""
        known, state = self.identifier.languages, np.zeros(len(self.identifier.languages))
        if language is not None:
            if canonical(language) not in known:
                raise UserError(
                    f"{language!r} is none of the languages that are told apart here: "
                    f"{', '.join(known)}; leave --language out"
                )
            state[known.index(canonical(language))] = 1e6
        return state

    def terms(self, before, ids):
        # Enough for the characters that an n-gram reaches back, unless pieces are empty.
        context = "".join(self.pieces[i] for i in before[-8:].tolist())
        return self.identifier.terms(context, [self.pieces[i] for i in ids.tolist()])

    def languages(self, states: Float[np.ndarray, "T Z"]) -> Float[np.ndarray, "T Z"]:
        """Log probabilities of the languages."""
        return _normalised(states / self.identifier.temperature)

    def log_weights(self, states, evidence):
        probabilities = np.exp(self.languages(states))
        weights = np.zeros((len(states), self.experts))
        for column, tag in enumerate(self.identifier.languages):
            if tag in self.serving:
                weights[:, self.serving[tag]] += probabilities[:, column]
            else:
                weights += probabilities[:, column : column + 1] / self.experts
        with np.errstate(divide="ignore"):
            return _normalised(np.log(weights))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tfidf(_NeverAsks, _SumsVectors):
    """w_j ~ exp(-||h(x_<t) - c_j||^distance_power / temperature) (X-ELM section 3.3, after
    Gururangan et al. 2023). The authors' code squares the squared distance: distance_power 4."""

    vectoriser: Vectoriser
    """Ids to vectors."""
    centres: Float[np.ndarray, "E D"]
    """Where each expert's training documents lie."""
    temperature: float = TEMPERATURE
    """Small trusts the nearest centre alone; .1 in the authors' code."""
    distance_power: float = DISTANCE_POWER
    """Exponent of the distance."""

    def __post_init__(self) -> None:
        check_tfidf(self.temperature, self.distance_power)

    @property
    def experts(self):
        return len(self.centres)

    def log_weights(self, states, evidence):
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


def check_tfidf(temperature: float, distance_power: float) -> None:
    """Raises UserError for values that mean nothing."""
    if not temperature > 0 or not distance_power > 0:
        raise UserError(
            "TF-IDF routing wants a temperature and a distance power above 0; got "
            f"{temperature} and {distance_power}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned(_NeverAsks, _SumsVectors):
    """Logistic regression on the TF-IDF vector of the text so far and on how much it has."""

    vectoriser: Vectoriser
    """Ids to vectors."""
    weights: Float[np.ndarray, "D1 E"]
    """Of `features`."""
    bias: Float[np.ndarray, " E"]
    """Of experts."""

    @property
    def experts(self):
        return len(self.bias)

    @staticmethod
    def features(states: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "T D1"]:
        """The direction of a sum, shorter where it is of few tokens, and a number that says how
        short: little text speaks softly."""
        norms = np.linalg.norm(states, axis=1, keepdims=True)
        surety = norms / (norms + 5.0)
        return np.concatenate([unit(states) * surety, surety], axis=1)

    def log_weights(self, states, evidence):
        return _normalised(self.features(states) @ self.weights + self.bias)


@dataclass(frozen=True, kw_only=True, slots=True)
class Posterior(_Stateless):
    """w_j ~ prior_j * prod p_j(x_<t): Bayes' rule over the experts. Asks every expert."""

    prior: Float[np.ndarray, " E"]
    """Log prior, normalised."""
    memory: float = 1.0
    """Below 1 it forgets: a token counts by this to the power of how far it lies back."""

    def __post_init__(self) -> None:
        if not 0 < self.memory <= 1:
            raise UserError(f"a memory must be above 0 and at most 1; got {self.memory}")

    @property
    def experts(self):
        return len(self.prior)

    def asks(self, states):
        return np.ones(len(states), bool)

    def log_weights(self, states, evidence):
        return _normalised(self.prior + evidence)


@dataclass(frozen=True, kw_only=True, slots=True)
class Abstaining:
    """Another router, where its largest weight reaches a threshold; elsewhere the posterior, or one
    model that is for all languages."""

    router: Router
    """Of E experts."""
    threshold: float
    """Largest weight from which on it decides."""
    fallback: int | None = None
    """Index of the model that speaks instead, behind the experts: E; None: the posterior."""
    prior: Float[np.ndarray, " E"] | None = None
    """Of that, log and normalised."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"a threshold must be between 0 and 1; got {self.threshold}")

    @property
    def experts(self):
        return self.router.experts + (self.fallback is not None)

    @property
    def memory(self):
        return self.router.memory

    def start(self, language):
        return self.router.start(language)

    def terms(self, before, ids):
        return self.router.terms(before, ids)

    def _own(self, states):
        """What the router says, and where it is not sure."""
        found = self.router.log_weights(states, np.zeros((len(states), 0)))
        return found, np.exp(found.max(axis=1)) < self.threshold

    def asks(self, states):
        return self._own(states)[1] & (self.fallback is None)

    def log_weights(self, states, evidence):
        found, unsure = self._own(states)
        if self.fallback is None:
            return np.where(unsure[:, None], _normalised(self.prior + evidence), found)
        found = among(found, self.experts)
        instead = np.full(found.shape[1], -np.inf)
        instead[self.fallback] = 0.0
        return np.where(unsure[:, None], instead, found)


def keep_largest(
    log_weights: Float[np.ndarray, "T E"],
    count: int | None,
    least: Float[np.ndarray, " T"] | float = 0.0,
) -> Float[np.ndarray, "T E"]:
    """The `count` largest weights of each row (None: all) that are not below `least`, normalised
    again; the largest is always kept, and the first of equals wins."""
    experts = log_weights.shape[-1]
    if np.any(np.asarray(least) > 0):
        with np.errstate(divide="ignore"):
            floor = np.log(np.broadcast_to(least, log_weights.shape[:1]))[:, None]
        floor = np.minimum(floor, log_weights.max(axis=-1, keepdims=True))
        log_weights = _normalised(np.where(log_weights < floor, -np.inf, log_weights))
    if count is None or count >= experts:
        return log_weights
    order = np.argsort(-log_weights, axis=-1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(experts), order.shape), axis=-1)
    return _normalised(np.where(ranks < count, log_weights, -np.inf))


def among(log_weights: Float[np.ndarray, "T E"], models: int) -> Float[np.ndarray, "T M"]:
    """With no weight for the models behind those that a router weighs."""
    more = models - log_weights.shape[-1]
    return np.pad(log_weights, ((0, 0), (0, more)), constant_values=-np.inf)


def mixture(
    log_weights: Float[np.ndarray, "T E"], scores: Float[np.ndarray, "E T"]
) -> Float[np.ndarray, " T"]:
    """log sum_j w_j p_j at each token: a mixture of probabilities, in log space."""
    return _logsumexp(log_weights + scores.T)[:, 0]


ROUTINGS: Sequence[str] = (
    *("language", "detected", "tfidf", "learned", "posterior", "uniform", "fixed"),
)


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
