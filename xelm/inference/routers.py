"""The routers: what each one makes of a text, and how it weighs the experts by it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from clustering.errors import UserError
from clustering.identify import Identifier
from clustering.languages import lookup
from clustering.novelty import Novelty
from clustering.vectoriser import Vectoriser
from xelm.inference.route import Router, among, normalised
from xelm.inference.routing import DISTANCE_POWER, TEMPERATURE, check_tfidf

MIXTURE = "mixture"
"""What decides where no expert is for a text, in `decided_by`."""


class _ByTextAlone:
    """Knows the weights without any expert reading the text."""

    __slots__ = ()
    memory = 1.0

    def needs_log_likelihoods(self, states):
        return np.zeros(len(states), bool)


class _Named:
    """Decides every row itself, under the name of its routing."""

    __slots__ = ()
    name: str

    def decided_by(self, states):
        return [self.name] * len(states)


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
class Fixed(_ByTextAlone, _Stateless, _Named):
    """The same weights everywhere."""

    weights: Float[np.ndarray, " E"]
    """Log weights, normalised."""
    name: str = "fixed"
    """Of the routing."""

    @property
    def experts(self):
        return len(self.weights)

    def log_weights(self, states, log_likelihoods):
        return np.tile(self.weights, (len(states), 1))


def uniform(experts: int) -> Fixed:
    """Equal weights for all experts."""
    return Fixed(weights=np.full(experts, -np.log(experts)), name="uniform")


@dataclass(frozen=True, kw_only=True, slots=True)
class ByLanguage:
    """All weight to the expert that serves the language that a text is said to be in. Where no
    language is given, or no expert serves it, another router decides.

    The state has one number before that router's: the expert's index plus one, or zero."""

    experts: int
    """E."""
    serving: Mapping[str, int]
    """Tag of a language -> expert; `languages.lookup` finds it for the language that is given."""
    otherwise: Router | None = None
    """The other router, of E models; None: a text must have a language that is served."""

    @property
    def memory(self):
        return 1.0 if self.otherwise is None else self.otherwise.memory

    def start(self, language):
        """UserError if the language is unknown, and where there is no other router, if it is not
        given or not served."""
        tag = None if language is None else lookup(language, self.serving)
        expert = None if tag is None else self.serving[tag]
        if self.otherwise is not None:
            first = 0.0 if expert is None else expert + 1.0
            # Of clusters of documents nobody is known to serve a language, or not to.
            unserved = language if expert is None and self.serving else None
            return np.concatenate([[first], self.otherwise.start(unserved)])
        if language is None:
            raise UserError("routing by language needs the language of the text; give --language")
        if expert is None:
            served = ", ".join(sorted(self.serving)) or "none, since experts are of documents"
            raise UserError(
                f"no expert serves {language!r}; served: {served}. Grow one, or use another routing"
            )
        return np.asarray([expert + 1.0])

    def terms(self, before, ids):
        nothing = np.zeros((len(ids), 1))
        if self.otherwise is None:
            return nothing
        return np.concatenate([nothing, self.otherwise.terms(before, ids)], axis=1)

    def needs_log_likelihoods(self, states):
        needed = states[:, 0] == 0
        if self.otherwise is not None:
            needed[needed] = self.otherwise.needs_log_likelihoods(states[needed, 1:])
        return needed

    def log_weights(self, states, log_likelihoods):
        told = np.flatnonzero(states[:, 0])
        found = np.full((len(states), self.experts), -np.inf)
        found[told, states[told, 0].astype(int) - 1] = 0.0
        if self.otherwise is not None and len(told) < len(states):
            rest = states[:, 0] == 0
            found[rest] = self.otherwise.log_weights(states[rest, 1:], log_likelihoods[rest])
        return found

    def decided_by(self, states):
        names = ["language"] * len(states)
        rest = np.flatnonzero(states[:, 0] == 0)
        if self.otherwise is not None and len(rest):
            for row, name in zip(rest, self.otherwise.decided_by(states[rest, 1:])):
                names[row] = name
        return names


@dataclass(frozen=True, kw_only=True, slots=True)
class Detected(_ByTextAlone, _Named):
    """The probability of each expert's languages, as they are seen in the text."""

    name: ClassVar[str] = "detected"
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
        return np.zeros(len(self.identifier.languages))

    def terms(self, before, ids):
        context = _context(self.pieces, before)
        return self.identifier.terms(context, [self.pieces[i] for i in ids.tolist()])

    def languages(self, states: Float[np.ndarray, "T Z"]) -> Float[np.ndarray, "T Z"]:
        """Log probabilities of the languages."""
        return normalised(states / self.identifier.temperature)

    def log_weights(self, states, log_likelihoods):
        probabilities = np.exp(self.languages(states))
        weights = np.zeros((len(states), self.experts))
        for column, tag in enumerate(self.identifier.languages):
            if tag in self.serving:
                weights[:, self.serving[tag]] += probabilities[:, column]
            else:
                weights += probabilities[:, column : column + 1] / self.experts
        with np.errstate(divide="ignore"):
            return normalised(np.log(weights))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tfidf(_ByTextAlone, _SumsVectors, _Named):
    """w_j ~ exp(-||h(x_<t) - c_j||^distance_power / temperature) (X-ELM section 3.3, after
    Gururangan et al. 2023). The authors' code squares the squared distance: distance_power 4."""

    name: ClassVar[str] = "tfidf"
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

    def log_weights(self, states, log_likelihoods):
        vectors = unit(states)
        squared = (
            np.square(vectors).sum(axis=1, keepdims=True)
            - 2 * vectors @ self.centres.T
            + np.square(self.centres).sum(axis=1)
        )
        distance = np.maximum(squared, 0.0) ** (self.distance_power / 2)
        # Before the first known term nothing speaks for any expert, not even a centre near zero.
        distance = np.where(vectors.any(axis=1, keepdims=True), distance, 0.0)
        return normalised(-distance / self.temperature)


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned(_ByTextAlone, _SumsVectors, _Named):
    """Logistic regression on the TF-IDF vector of the text so far and on how much it has."""

    name: ClassVar[str] = "learned"
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

    def log_weights(self, states, log_likelihoods):
        return normalised(self.features(states) @ self.weights + self.bias)


@dataclass(frozen=True, kw_only=True, slots=True)
class Posterior(_Stateless, _Named):
    """w_j ~ prior_j * prod p_j(x_<t): Bayes' rule over the experts. Asks every expert."""

    name: ClassVar[str] = "posterior"
    prior: Float[np.ndarray, " E"]
    """Log prior, normalised."""
    memory: float = 1.0
    """Below 1 it forgets: a token counts by this to the power of how far it lies back."""
    sharpness: float = 1.0
    """What evidence is multiplied by; below 1 several models keep weight."""

    def __post_init__(self) -> None:
        if not 0 < self.memory <= 1:
            raise UserError(f"a memory must be above 0 and at most 1; got {self.memory}")

    @property
    def experts(self):
        return len(self.prior)

    def needs_log_likelihoods(self, states):
        return np.ones(len(states), bool)

    def log_weights(self, states, log_likelihoods):
        return normalised(self.prior + self.sharpness * log_likelihoods)


@dataclass(frozen=True, kw_only=True, slots=True)
class OrMixture:
    """Another router, on text in languages that experts serve; on all other text a mixture of all
    models, those behind the experts too.

    The state has one number that is not zero where it is given that nobody serves the language,
    then the sums of `novelty`, then those of the other router."""

    router: Router
    """Of E experts; one that asks for no evidence."""
    novelty: Novelty
    """Tells which text is in none of the languages that are served."""
    pieces: list[str]
    """The characters of each id, as the novelty was fitted on them."""
    mixture: Posterior
    """Of the E experts and the models behind them."""

    @property
    def experts(self):
        return self.mixture.experts

    @property
    def memory(self):
        return self.mixture.memory

    def start(self, language):
        """language: one that no expert serves, so that the text need not show it; None: not
        given."""
        given = [float(language is not None)]
        return np.concatenate([given, np.zeros(self.novelty.size), self.router.start(None)])

    def terms(self, before, ids):
        context = _context(self.pieces, before)
        found = self.novelty.terms(context, [self.pieces[i] for i in ids.tolist()], ids)
        nothing = np.zeros((len(ids), 1))
        return np.concatenate([nothing, found, self.router.terms(before, ids)], axis=1)

    def _own(self, states):
        """The sums of the other router."""
        return states[:, 1 + self.novelty.size :]

    def needs_log_likelihoods(self, states):
        return (states[:, 0] != 0) | self.novelty.outside(states[:, 1 : 1 + self.novelty.size])

    def log_weights(self, states, log_likelihoods):
        outside, own = self.needs_log_likelihoods(states), self._own(states)
        found = np.empty((len(states), self.experts))
        inside = self.router.log_weights(own[~outside], np.zeros((len(own[~outside]), 0)))
        found[~outside] = among(inside, self.experts)
        found[outside] = self.mixture.log_weights(own[outside], log_likelihoods[outside])
        return found

    def decided_by(self, states):
        names = self.router.decided_by(self._own(states))
        return [
            MIXTURE if out else name for out, name in zip(self.needs_log_likelihoods(states), names)
        ]


def mixture_of(models: int) -> Posterior:
    """The mixture of so many models for text that no expert is for. It forgets soon, and believes a
    third of what it sees: sharper ones trust the best model too much, and equal weights know
    nothing of which model is good (docs/inference.md)."""
    return Posterior(prior=uniform(models).weights, memory=0.8, sharpness=0.3)


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
    fallback_name: str = Posterior.name
    """Name of that model, or of the posterior."""
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

    def needs_log_likelihoods(self, states):
        return self._own(states)[1] & (self.fallback is None)

    def log_weights(self, states, log_likelihoods):
        found, unsure = self._own(states)
        if self.fallback is None:
            return np.where(unsure[:, None], normalised(self.prior + log_likelihoods), found)
        found = among(found, self.experts)
        instead = np.full(found.shape[1], -np.inf)
        instead[self.fallback] = 0.0
        return np.where(unsure[:, None], instead, found)

    def decided_by(self, states):
        return [
            self.fallback_name if unsure else name
            for unsure, name in zip(self._own(states)[1], self.router.decided_by(states))
        ]


def _context(pieces: list[str], before: Int[np.ndarray, " _"]) -> str:
    """The end of the text before, enough for the characters that an n-gram reaches back unless
    pieces are empty."""
    return "".join(pieces[i] for i in before[-8:].tolist())


def unit(vectors: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "T D"]:
    """Vectors of length one; zero stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
