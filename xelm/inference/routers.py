"""The routers: the state that each keeps of a text, and how it weighs the experts by it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
"""Name, in `decided_by`, of the mixture of all models that decides where no expert fits a text."""


class _Single:
    """Router that decides every row itself, before any expert reads the text."""

    __slots__ = ()
    memory = 1.0
    name: str

    def needs_log_likelihoods(self, states):
        return np.zeros(len(states), bool)

    def decided_by(self, states):
        return [self.name] * len(states)


class _Stateless:
    """Router whose state does not depend on the text."""

    __slots__ = ()

    def start(self, language):
        return np.zeros(0)

    def terms(self, before, ids):
        return np.zeros((len(ids), 0))


class _SumsVectors:
    """Router whose state is the sum of the TF-IDF vectors of ids."""

    __slots__ = ()
    vectoriser: Vectoriser

    def start(self, language):
        return np.zeros(self.vectoriser.dimensions)

    def terms(self, before, ids):
        # Ids beyond the vocabulary, for which a model may have rows, add nothing.
        known = ids < self.vectoriser.vocabulary_size
        return self.vectoriser.terms(np.where(known, ids, 0)) * known[:, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed(_Single, _Stateless):
    """The same weights everywhere."""

    weights: Float[np.ndarray, " E"]
    """Log weights, normalised."""
    name: str = "fixed"
    """Name of the routing."""

    @property
    def experts(self):
        return len(self.weights)

    def log_weights(self, states, log_likelihoods):
        return np.tile(self.weights, (len(states), 1))


def uniform(experts: int) -> Fixed:
    """Equal weights for all experts."""
    return Fixed(weights=np.full(experts, -np.log(experts)), name="uniform")


def only(model: int, models: int, name: str) -> Fixed:
    """All weight on one of several models, under the name of a routing."""
    return Fixed(weights=np.where(np.arange(models) == model, 0.0, -np.inf), name=name)


class _Either(ABC):
    """Router that leaves each row to one of several others, over its first models or all."""

    __slots__ = ()
    experts: int

    @abstractmethod
    def _parts(self, states) -> list[tuple[Router, np.ndarray, np.ndarray]]:
        """Other routers, each with the rows that it decides [T] and its states of all rows."""

    def needs_log_likelihoods(self, states):
        found = np.zeros(len(states), bool)
        for router, rows, own in self._parts(states):
            found[rows] = router.needs_log_likelihoods(own[rows])
        return found

    def log_weights(self, states, log_likelihoods):
        found = np.full((len(states), self.experts), -np.inf)
        for router, rows, own in self._parts(states):
            weights = router.log_weights(own[rows], log_likelihoods[rows, : router.experts])
            found[rows] = among(weights, self.experts)
        return found

    def decided_by(self, states):
        names = np.empty(len(states), object)
        for router, rows, own in self._parts(states):
            names[rows] = router.decided_by(own[rows])
        return names.tolist()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stated(_Single, _Stateless):
    """Gives all weight to the expert whose index plus one is the first number of the state."""

    name: ClassVar[str] = "language"
    experts: int

    def log_weights(self, states, log_likelihoods):
        return np.where(np.arange(self.experts) == states[:, :1] - 1, 0.0, -np.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class ByLanguage(_Either):
    """Gives all weight to the expert that serves the language that is given for a text. Where none
    is given, or no expert serves it, another router decides.

    The state has one number before that router's: the expert's index plus one, or zero."""

    experts: int
    """Number of experts, E."""
    serving: Mapping[str, int]
    """Tag of a language -> expert; `languages.lookup` finds it for the language that is given."""
    otherwise: Router | None = None
    """The other router, over E models; None: each text must have a language that is served."""
    retired: Mapping[str, str] = field(default_factory=dict)
    """Tag of a language that only a retired expert serves -> name of that expert."""

    @property
    def memory(self):
        return 1.0 if self.otherwise is None else self.otherwise.memory

    def start(self, language):
        """The first state. UserError if the language is unknown or, where there is no other router,
        not given or not served."""
        tag = None if language is None else lookup(language, self.serving)
        expert = None if tag is None else self.serving[tag]
        if self.otherwise is not None:
            first = 0.0 if expert is None else expert + 1.0
            # Experts of clusters of documents are not known to serve a language or not to.
            unserved = language if expert is None and self.serving else None
            return np.concatenate([[first], self.otherwise.start(unserved)])
        if language is None:
            raise UserError("routing by language needs the language of the text; give --language")
        if expert is None:
            served = ", ".join(sorted(self.serving)) or "none, since experts are of documents"
            retired = lookup(language, self.retired)
            if retired is not None:
                name = self.retired[retired]
                raise UserError(
                    f"{name}, the expert for {language!r}, is retired; bring it back with: xelm "
                    f"restore RUN {name}; served: {served}"
                )
            raise UserError(
                f"no expert serves {language!r}; served: {served}. Grow one, or use another routing"
            )
        return np.asarray([expert + 1.0])

    def terms(self, before, ids):
        nothing = np.zeros((len(ids), 1))
        if self.otherwise is None:
            return nothing
        return np.concatenate([nothing, self.otherwise.terms(before, ids)], axis=1)

    def _parts(self, states):
        given = states[:, 0] > 0
        stated = _Stated(experts=self.experts), given, states
        return [stated] + ([(self.otherwise, ~given, states[:, 1:])] if self.otherwise else [])


@dataclass(frozen=True, kw_only=True, slots=True)
class Detected(_Single):
    """Weighs each expert by the probability of its languages, as they are detected in the text."""

    name: ClassVar[str] = "detected"
    experts: int
    """Number of experts, E."""
    identifier: Identifier
    """Detects languages by characters."""
    pieces: list[str]
    """The characters of each id, as the identifier was fitted on them."""
    serving: Mapping[str, int]
    """Canonical tag of a language -> expert; the probability of other languages goes to all experts
    alike."""

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
class Tfidf(_Single, _SumsVectors):
    """w_j ~ exp(-||h(x_<t) - c_j||^distance_power / temperature) (X-ELM section 3.3, after
    Gururangan et al. 2023). The authors' code squares the squared distance: distance_power 4."""

    name: ClassVar[str] = "tfidf"
    vectoriser: Vectoriser
    """Makes vectors of ids."""
    centres: Float[np.ndarray, "E D"]
    """Centre of each expert's training documents."""
    temperature: float = TEMPERATURE
    """Temperature of the weights, .1 in the authors' code; small ones trust the nearest centre."""
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
        # Before the first known term all experts weigh alike, even one whose centre is near zero.
        distance = np.where(vectors.any(axis=1, keepdims=True), distance, 0.0)
        return normalised(-distance / self.temperature)


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned(_Single, _SumsVectors):
    """Logistic regression on the TF-IDF vector of the text so far and on how much it has."""

    name: ClassVar[str] = "learned"
    vectoriser: Vectoriser
    """Makes vectors of ids."""
    weights: Float[np.ndarray, "D1 E"]
    """Weights of the `features`."""
    bias: Float[np.ndarray, " E"]
    """Bias of each expert."""

    @property
    def experts(self):
        return len(self.bias)

    @staticmethod
    def features(states: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "T D1"]:
        """The direction of a sum, shorter where it is of few tokens, and a number that says how
        short, since a short text says little."""
        norms = np.linalg.norm(states, axis=1, keepdims=True)
        surety = norms / (norms + 5.0)
        return np.concatenate([unit(states) * surety, surety], axis=1)

    def log_weights(self, states, log_likelihoods):
        return normalised(self.features(states) @ self.weights + self.bias)


@dataclass(frozen=True, kw_only=True, slots=True)
class OfSome:
    """A router over some of the experts; the others have no weight, as nothing is known of the text
    that they are for."""

    router: Router
    """Weighs those that it knows."""
    places: Sequence[int]
    """Index of each of these among all experts."""
    experts: int
    """Number of all experts, E."""

    @property
    def memory(self):
        return self.router.memory

    def start(self, language):
        return self.router.start(language)

    def terms(self, before, ids):
        return self.router.terms(before, ids)

    def needs_log_likelihoods(self, states):
        return self.router.needs_log_likelihoods(states)

    def log_weights(self, states, log_likelihoods):
        found = np.full((len(states), self.experts), -np.inf)
        own = log_likelihoods[:, self.places] if log_likelihoods.shape[1] else log_likelihoods
        found[:, self.places] = self.router.log_weights(states, own)
        return found

    def decided_by(self, states):
        return self.router.decided_by(states)


@dataclass(frozen=True, kw_only=True, slots=True)
class Posterior(_Single, _Stateless):
    """Weights w_j ~ prior_j * prod p_j(x_<t): Bayes' rule over experts that all read the text."""

    prior: Float[np.ndarray, " E"]
    """Log prior, normalised."""
    name: str = "posterior"
    """Name of the routing."""
    memory: float = 1.0
    """Decay of log-likelihoods: a token counts by this to the power of its distance; 1 is none."""
    sharpness: float = 1.0
    """Factor of log-likelihoods; below 1 several models keep weight."""

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
class OrMixture(_Either):
    """Another router for text in languages that experts serve; for all other text a mixture of all
    models, those behind the experts too.

    The state has one number that is not zero where a language is given that no expert serves, then
    the sums of `novelty`, then those of the other router."""

    router: Router
    """The other router, over E experts; one that needs no log-likelihoods."""
    novelty: Novelty
    """Detects text in languages that no expert serves."""
    pieces: list[str]
    """The characters of each id, as the novelty was fitted on them."""
    mixture: Posterior
    """Mixture of the E experts and the models behind them."""

    @property
    def experts(self):
        return self.mixture.experts

    @property
    def memory(self):
        return self.mixture.memory

    def start(self, language):
        """The first state. language: one that no expert serves; None: not given."""
        given = [float(language is not None)]
        return np.concatenate([given, np.zeros(self.novelty.size), self.router.start(None)])

    def terms(self, before, ids):
        context = _context(self.pieces, before)
        found = self.novelty.terms(context, [self.pieces[i] for i in ids.tolist()], ids)
        nothing = np.zeros((len(ids), 1))
        return np.concatenate([nothing, found, self.router.terms(before, ids)], axis=1)

    def _parts(self, states):
        size = 1 + self.novelty.size
        outside = (states[:, 0] != 0) | self.novelty.outside(states[:, 1:size])
        own = states[:, size:]
        return [(self.mixture, outside, own), (self.router, ~outside, own)]


def mixture_of(models: int) -> Posterior:
    """Mixture of so many models for text that no expert fits. It forgets soon, and takes a third of
    the log-likelihoods: sharper mixtures trust the best model too much, and equal weights ignore
    which model is good (docs/inference.md)."""
    return Posterior(prior=uniform(models).weights, memory=0.8, sharpness=0.3, name=MIXTURE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Abstaining(_Either):
    """A router where its largest weight reaches a threshold, and another one elsewhere."""

    router: Router
    """The first router, over E experts; one that needs no log-likelihoods."""
    threshold: float
    """Largest weight from which on it decides."""
    instead: Router
    """Decides where it does not, by the same state: a `Posterior` over the experts, or all weight
    on `only` the model behind them."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"a threshold must be between 0 and 1; got {self.threshold}")

    @property
    def experts(self):
        return self.instead.experts

    @property
    def memory(self):
        return self.instead.memory

    def start(self, language):
        return self.router.start(language)

    def terms(self, before, ids):
        return self.router.terms(before, ids)

    def _parts(self, states):
        largest = self.router.log_weights(states, np.zeros((len(states), 0))).max(axis=1)
        unsure = np.exp(largest) < self.threshold
        return [(self.instead, unsure, states), (self.router, ~unsure, states)]


def _context(pieces: list[str], before: Int[np.ndarray, " _"]) -> str:
    """End of the text before: enough characters for an n-gram, unless pieces are empty."""
    return "".join(pieces[i] for i in before[-8:].tolist())


def unit(vectors: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "T D"]:
    """Vectors of length one; zero stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
