"""Text for models of several vocabularies: each text is read in one of them.

A pool has one vocabulary. Where some of its models have more pieces than the others, there is a
further pool of the same models for each such vocabulary (`Pool.further`). A model that lacks some
of a pool's ids gives them probability zero and reads them as the mean of what they stand for; one
that has ids which a pool lacks gives those of the pool all its probability."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Float, Int

from xelm.data.vocabulary import Vocabulary
from xelm.inference.pool import OwnVocabulary, Pool
from xelm.inference.route import Router, Walk, normalised, routing_mask
from xelm.inference.scoring import Scorer, at_once, decide_along
from xelm.inference.work import Work, finish
from xelm.models.config import ModelConfig
from xelm.models.narrow import whole
from xelm.models.parameters import NEW_ROWS
from xelm.models.vocabulary_rows import new_rows, resized

LEAST_OF_OWNERS = 2 / 3
"""Smallest weight, in a pool for text with further pieces, of the expert with the largest weight
among those that have these pieces. A text is read in its pieces where a router prefers it, and
otherwise a piece might follow while a router still looks for the language, or keeps only others."""
_CONTEXT = 16
"""Ids before a token that a router reads for it; few of them are enough for its n-grams."""

P = TypeVar("P", bound=Pool)


def choose(
    pool: P,
    prompts: Sequence[Sequence[int] | Int[np.ndarray, " _"]],
    languages: Sequence[str | None],
    user_masks: Sequence[Sequence[bool] | None] | None = None,
    router: Router | None = None,
) -> list[P]:
    """The pool in whose vocabulary each prompt is to be read; arguments as of `Choice`."""
    return finish(Choice(pool, prompts, languages, user_masks, router).decide())


class Choice(Generic[P]):
    """Decides in which vocabulary each of some prompts is to be read: in that of the expert with
    the largest weight after the prompt. So a language that is stated, and serves an expert, decides
    alone."""

    def __init__(
        self,
        pool: P,
        prompts: Sequence[Sequence[int] | Int[np.ndarray, " _"]],
        languages: Sequence[str | None],
        user_masks: Sequence[Sequence[bool] | None] | None = None,
        router: Router | None = None,
    ):
        """prompts: in the seed's ids, with the token that starts texts. user_masks: as in
        `GenerationRequest`. router: None: the pool's."""
        router = router or pool.router
        self._pool, self._routed = pool, replace(pool, router=router)
        self._documents = [np.asarray(prompt, np.int64) for prompt in prompts]
        masks = [None] * len(prompts) if user_masks is None else user_masks
        self._walks = [
            Walk(
                router,
                language,
                ids,
                np.asarray([len(ids)]),
                routing_mask(pool.tokenizer, ids, mask),
            )
            for ids, language, mask in zip(self._documents, languages, masks)
            if pool.further
        ]

    @property
    def reads(self) -> bool:
        """Whether models have to read the prompts before it is decided."""
        return any(walk.needs_log_likelihoods for walk in self._walks)

    def decide(self, score: Scorer = at_once) -> Work[list[P]]:
        """The pool in whose vocabulary each prompt is to be read. score: how models read."""
        pool = self._pool
        if not pool.further:
            return [pool] * len(self._documents)
        form = replace(pool.tokenizer.text_format, start_id=None)
        reading = pool.reading | {"text_format": form}
        decisions, *_ = yield from decide_along(
            self._routed, self._walks, self._documents, reading, score
        )
        return [pool_of(pool, int(one.log_weights[0].argmax())) for one in decisions]


def joined(pool: P, further: Sequence[P]) -> P:
    """A pool with further pools of the same models for text in other vocabularies, in each of which
    models of another vocabulary are compared with the others as they read text in their own."""

    def read_by(home: Pool, model: int) -> OwnVocabulary:
        parameters = partial(home.parameters.__getitem__, model)
        return OwnVocabulary(model=home.model, parameters=parameters, vocabulary=home.vocabulary)

    homes: list[Pool] = [
        next((one for one in further if model in one.owners), pool)
        for model in range(len(pool.names))
    ]

    def with_own(one: P) -> P:
        others = [(model, home) for model, home in enumerate(homes) if home is not one]
        return replace(one, own={model: read_by(home, model) for model, home in others})

    return replace(with_own(pool), further=[with_own(one) for one in further])


def pool_of(pool: P, model: int) -> P:
    """The pool with the vocabulary of a model."""
    return next((one for one in pool.further if model in one.owners), pool)  # type: ignore[misc]


def loader(
    read: Callable[[ModelConfig], Any],
    model: ModelConfig,
    own: Vocabulary | None,
    pool: Vocabulary | None,
) -> Callable[[], Any]:
    """A function that returns the parameters of a model with one vocabulary, for a pool with
    another. read: returns the parameters on the host, of a shape. model: the seed's shape."""
    shape = model if own is None else resized(model, own.size)
    if same(own, pool):
        return partial(read, shape)

    def load() -> Any:
        found = read(shape)
        return {**found, NEW_ROWS: rows_for(pool, model, whole(found["embedding"]))}

    return load


def same(own: Vocabulary | None, pool: Vocabulary | None) -> bool:
    """Whether a model's vocabulary is that of a pool."""
    return (own and own.key) == (pool and pool.key)


def rows_for(
    pool: Vocabulary | None, model: ModelConfig, embedding: Float[np.ndarray, "V1 D"]
) -> Float[np.ndarray, "N D"]:
    """The `NEW_ROWS` of a model with this embedding for a pool with another vocabulary. model: the
    seed's shape."""
    known = model.vocabulary_size
    size, expansions = (known, ()) if pool is None else (pool.size, pool.expansions)
    return new_rows(embedding, known, size, expansions)


@dataclass(frozen=True, kw_only=True, slots=True)
class InPieces:
    """A router for text with further pieces: it goes by the seed's ids that they stand for."""

    router: Router
    """The router by the seed's ids."""
    vocabulary: Vocabulary
    """The pieces."""
    owners: Sequence[int]
    """Experts that have them; the best of these has a weight of at least `LEAST_OF_OWNERS`."""
    given: bool = False
    """Whether weights were given by hand, and stay as they are."""

    @property
    def experts(self):
        return self.router.experts

    @property
    def memory(self):
        return self.router.memory

    def start(self, language):
        return self.router.start(language)

    def terms(self, before, ids):
        expand = self.vocabulary.expand
        terms = self.router.terms(expand(before[-_CONTEXT:]), expand(ids))
        if not len(ids):
            return terms
        counts = self.vocabulary.counts(ids)
        return np.add.reduceat(terms, np.cumsum(counts) - counts, axis=0)

    def needs_log_likelihoods(self, states):
        return self.router.needs_log_likelihoods(states)

    def decided_by(self, states):
        return self.router.decided_by(states)

    def log_weights(self, states, log_likelihoods):
        found = self.router.log_weights(states, log_likelihoods)
        owners = [owner for owner in self.owners if owner < found.shape[1]]
        return found if self.given or not owners else _with_owners(found, owners)


def _with_owners(
    log_weights: Float[np.ndarray, "T E"], owners: Sequence[int]
) -> Float[np.ndarray, "T E"]:
    """The same weights, where the best owner has at least `LEAST_OF_OWNERS`, and the rest goes to
    the others as it was among them."""
    best = np.asarray(owners)[log_weights[:, list(owners)].argmax(axis=1)]
    is_best = np.arange(log_weights.shape[1]) == best[:, None]
    too_little = np.exp(log_weights[is_best]) < LEAST_OF_OWNERS
    if not too_little.any():
        return log_weights
    # Where the best owner has less, the others have some weight.
    others = np.where(is_best, -np.inf, log_weights)
    others = np.where(too_little[:, None], others, 0.0)
    raised = np.where(
        is_best, np.log(LEAST_OF_OWNERS), normalised(others) + np.log(1 - LEAST_OF_OWNERS)
    )
    return np.where(too_little[:, None], raised, log_weights)
