"""The ensemble: many experts, one distribution. p(x_t | x_<t) = sum_j w_j p_j(x_t | x_<t)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.special import logsumexp

from clustering.errors import UserError
from xelm.data.tokenizer import Tokenizer
from xelm.inference.decoding import Reader
from xelm.inference.routing import Router, keep_largest, mixture
from xelm.inference.scoring import score_documents
from xelm.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What the ensemble thinks of some texts."""

    nats: Float[np.ndarray, " texts"]
    """-log p of each text and its end."""
    tokens: Int[np.ndarray, " texts"]
    """Predicted tokens of each text, its end included."""
    weights: Mapping[str, Float[np.ndarray, " texts"]]
    """Expert -> its mean routing weight over each text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """A continuation."""

    text: str
    """Without the prompt."""
    ids: Sequence[int]
    """Its subword ids."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Expert -> its mean routing weight over the generated tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ensemble:
    """Experts of one shape, a router, and the tokenizer they share."""

    names: Sequence[str]
    """Of the E experts."""
    model: ModelConfig
    """Their shape."""
    parameters: Sequence[Any]
    """Of each expert: nested dictionaries of arrays, asked for only when the expert is."""
    router: Router
    """Who speaks when."""
    tokenizer: Tokenizer
    """Of the seed."""
    top_m: int | None = None
    """Experts asked at each token; None asks all that the router gives weight."""
    sequence_length: int = 512
    """Window of scoring, in tokens."""

    def score(self, texts: Sequence[str], languages: Sequence[str | None] | None = None) -> Scores:
        """Nats of each text, with the weights that the router gave. languages: of each text, where
        the router needs them."""
        languages = [None] * len(texts) if languages is None else languages
        ids = [np.asarray(x, np.int64) for x in self.tokenizer.encode(texts)]
        targets = [np.append(document, self.tokenizer.end_id) for document in ids]
        routes = [self.router.route(language) for language in languages]
        scores = [np.zeros((len(self.names), len(target))) for target in targets]
        if self.router.needs_scores:
            self._score(ids, scores, [np.arange(len(self.names))] * len(ids))
        log_weights = [
            keep_largest(route.along(target, found), self.top_m)
            for route, target, found in zip(routes, targets, scores)
        ]
        if not self.router.needs_scores:
            active = [np.flatnonzero(np.isfinite(w).any(axis=0)) for w in log_weights]
            self._score(ids, scores, active)
        weights = [np.exp(found).mean(axis=0) for found in log_weights]
        nats = [-mixture(w, found).sum() for w, found in zip(log_weights, scores)]
        return Scores(
            nats=np.asarray(nats),
            tokens=np.asarray([len(target) for target in targets]),
            weights=dict(zip(self.names, np.asarray(weights).reshape(-1, len(self.names)).T)),
        )

    def _score(
        self,
        ids: Sequence[np.ndarray],
        scores: Sequence[np.ndarray],
        active: Sequence[np.ndarray],
    ) -> None:
        """Fills each document's rows of `scores`, [E, n + 1], for the experts active in it."""
        for expert in range(len(self.names)):
            chosen = [number for number, experts in enumerate(active) if expert in experts]
            if not chosen:
                continue
            found = score_documents(
                self.model,
                self.parameters[expert],
                [ids[number] for number in chosen],
                start_id=self.tokenizer.start_id,
                end_id=self.tokenizer.end_id,
                sequence_length=self.sequence_length,
            )
            for number, row in zip(chosen, found):
                scores[number][expert] = row

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 40,
        temperature: float = 0.8,
        top_p: float = 0.95,
        random_seed: int = 0,
        language: str | None = None,
    ) -> Generation:
        """Continues the prompt until the end token or `max_new_tokens`. temperature 0 takes the
        most probable token each time; top_p samples from the smallest set of that probability."""
        _check(max_new_tokens, temperature, top_p)
        prompt_ids = self.tokenizer.encode([prompt])[0]
        room = self.model.max_length - max_new_tokens - 1
        if len(prompt_ids) > room:
            raise UserError(
                f"the prompt has {len(prompt_ids)} tokens; with {max_new_tokens} new ones, this "
                f"model of {self.model.max_length} has room for {max(0, room)}"
            )
        ids, weights = [], []
        random = np.random.default_rng(random_seed)
        for distribution, log_weights in self._steps(prompt_ids, ids, max_new_tokens, language):
            weights.append(np.exp(log_weights))
            token = _choose(distribution, temperature, top_p, random)
            if token == self.tokenizer.end_id:
                break
            ids.append(token)
        # Decoded behind the prompt: a leading space of the continuation would be lost alone.
        whole = self.tokenizer.decode([*prompt_ids, *ids])
        text = whole[len(self.tokenizer.decode(prompt_ids)) :]
        mean = np.asarray(weights).mean(axis=0) if weights else np.zeros(len(self.names))
        return Generation(text=text, ids=ids, weights=dict(zip(self.names, map(float, mean))))

    def _steps(
        self, prompt_ids: Sequence[int], new_ids: list[int], count: int, language: str | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Distributions of the next token with routing weights; the caller appends to `new_ids`
        what it chose. An expert reads what it has missed only once it carries weight."""
        slots = 1 << (len(prompt_ids) + count).bit_length()
        readers: dict[int, Reader] = {}
        everyone = list(range(len(self.names)))
        route = self.router.route(language)
        text = np.asarray([self.tokenizer.start_id, *prompt_ids])
        heard = np.full((len(everyone), len(text)), np.nan)
        if self.router.needs_scores:
            for expert in everyone:
                readers[expert] = Reader(self.model, self.parameters[expert], slots)
                heard[expert] = readers[expert].read(text, scored=True)
        for position, token in enumerate(prompt_ids, 1):
            route.observe(token, heard[:, position])
        for _ in range(count):
            log_weights = keep_largest(route.now(), self.top_m)
            speaking = np.flatnonzero(np.isfinite(log_weights)).tolist()
            active = everyone if self.router.needs_scores else speaking
            for expert in active:
                if expert not in readers:
                    readers[expert] = Reader(self.model, self.parameters[expert], slots)
                readers[expert].read(text[readers[expert].read_count :])
            following = np.stack([readers[expert].following for expert in speaking])
            mixed = logsumexp(log_weights[speaking, None] + following, axis=0)
            yield np.asarray(mixed), log_weights
            token = new_ids[-1]
            scores = np.full(len(everyone), np.nan)
            for expert in active:
                scores[expert] = readers[expert].following[token]
            route.observe(token, scores)
            text = np.append(text, token)


def _check(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens must be at least 0; got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature must be at least 0; got {temperature}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1; got {top_p}")


def _choose(
    log_probabilities: Float[np.ndarray, " V"],
    temperature: float,
    top_p: float,
    random: np.random.Generator,
) -> int:
    if temperature == 0:
        return int(log_probabilities.argmax())
    scaled = log_probabilities / temperature
    probabilities = np.exp(scaled - np.asarray(logsumexp(scaled)))
    order = np.argsort(-probabilities, kind="stable")
    # The smallest set of at least top_p; the most probable is always in it.
    kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1)]
    chances = probabilities[kept] / probabilities[kept].sum()
    return int(random.choice(kept, p=chances))
