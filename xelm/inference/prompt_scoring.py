"""How probable each token of given prompts is to an ensemble, and which tokens were likelier.

The models are weighed by the router at each token, as the engine weighs them where sequences grow.
Prompts are read in the windows of `Ensemble.likelihoods`, so that no model reads positions that its
training had not. Arrays as wide as the vocabulary exist for a few hundred tokens at a time; for a
whole prompt there are the states before the output head, D numbers a token and model, which is less
than a cache has.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from xelm.inference.decoder import PIECES, padded
from xelm.inference.pool import Pool
from xelm.inference.route import Decision, Router, Walk, routing_mask
from xelm.inference.routing import RoutingLimits
from xelm.inference.sampling import TokenLikelihood, likeliest
from xelm.inference.scoring import Window, windows
from xelm.models.config import ModelConfig
from xelm.models.head import target_log_probabilities
from xelm.models.parameters import bind, inference_graph

_ROWS = (1, 4, 16)
"""Numbers of prompts that are read in one call; few, as a program is compiled for each."""
_SHORTEST = 16
"""Tokens that a prompt is padded to at least."""


class PromptScores(NamedTuple):
    """How probable a prompt is to an ensemble."""

    tokens: list[TokenLikelihood]
    """One for each id; the first id follows nothing, and its log probability is nan."""
    weights: Mapping[str, float]
    """Model -> its mean weight over the tokens."""
    router: str
    """The router that decided most tokens."""


def score_prompts(
    pool: Pool,
    limits: RoutingLimits,
    prompts: Sequence[Sequence[int]],
    routers: Sequence[Router],
    languages: Sequence[str | None],
    alternatives: int,
) -> list[PromptScores]:
    """Scores the tokens of prompts, which are ids and read as they are.

    routers, languages: one for each prompt, which is routed token by token. alternatives: number of
    likeliest tokens that are named at each place.
    """
    ids = [np.asarray(prompt, np.int64) for prompt in prompts]
    states = _PromptStates(pool, ids)
    decisions = [
        _decision(states, limits, number, router, language)
        for number, (router, language) in enumerate(zip(routers, languages))
    ]
    flat = np.concatenate([decision.log_weights for decision in decisions])
    found = states.mixed(flat, alternatives)
    result, first = [], 0
    for prompt, decision in zip(ids, decisions):
        log_weights = decision.log_weights
        last = first + len(log_weights)
        nothing = TokenLikelihood(int(prompt[0]), float("nan"), ())
        mean = np.exp(log_weights).mean(axis=0) if len(log_weights) else np.zeros(flat.shape[1])
        weights = dict(zip(pool.names, mean.tolist()))
        result.append(PromptScores([nothing, *found[first:last]], weights, decision.router))
        first = last
    return result


def _decision(
    states: "_PromptStates",
    limits: RoutingLimits,
    number: int,
    router: Router,
    language: str | None,
) -> Decision:
    """Weights of the models before each token of a prompt but the first."""
    ids, pool = states.prompts[number], states.pool
    mask = routing_mask(pool.tokenizer, ids.tolist())
    walk = Walk.along(router, language, ids, np.arange(1, len(ids)), mask)
    scores = None
    if walk.needs_log_likelihoods:
        own = [states.scores(expert, number) for expert in range(router.experts)]
        scores = np.pad(own, [(0, 0), (1, 0)])  # the first token follows nothing
    return walk.decide(scores, limits, len(pool.names))


class _PromptStates:
    """States of models on prompts; each model reads them once, when its states are needed."""

    def __init__(self, pool: Pool, prompts: Sequence[Int[np.ndarray, " _"]]):
        self.pool, self.prompts = pool, prompts
        self._states: dict[int, list[Float[np.ndarray, "P D"]]] = {}

    def of(self, expert: int) -> list[Float[np.ndarray, "P D"]]:
        """The states from which a model predicts each token but the first, by prompt."""
        if expert not in self._states:
            self._states[expert] = self._read(expert)
        return self._states[expert]

    def scores(self, expert: int, number: int) -> Float[np.ndarray, " P"]:
        """Log probability of each token of a prompt but the first by one model."""
        states, wanted = self.of(expert)[number], self.prompts[number][1:]
        size = padded(max(len(wanted), _SHORTEST))
        rest = size - len(wanted)
        _, _, scored = _compiled(self.pool.model, self.pool.dtype)
        found = scored(
            self.pool.parameters[expert],
            np.pad(states, [(0, rest), (0, 0)]),
            np.pad(wanted, (0, rest)),
        )
        return np.asarray(found)[: len(wanted)]

    def mixed(
        self, log_weights: Float[np.ndarray, "N M"], alternatives: int
    ) -> list[TokenLikelihood]:
        """How probable every token but the first of each prompt is by the mixture of models."""
        wanted = np.concatenate([prompt[1:] for prompt in self.prompts])
        weighed = np.flatnonzero(np.isfinite(log_weights).any(axis=0)).tolist()
        states = {expert: np.concatenate(self.of(expert)) for expert in weighed}
        size = next((size for size in PIECES if size >= len(wanted)), PIECES[-1])
        _, add, _ = _compiled(self.pool.model, self.pool.dtype)
        found: list[TokenLikelihood] = []
        for first in range(0, len(wanted), size):
            part = slice(first, first + size)
            rest = size - len(wanted[part])
            mixture = jnp.full((size, self.pool.model.vocabulary_size), -jnp.inf)
            for expert in weighed:
                weights = log_weights[part, expert].astype(np.float32)
                if not np.isfinite(weights).any():
                    continue
                mixture = add(
                    self.pool.parameters[expert],
                    np.pad(states[expert][part], [(0, rest), (0, 0)]),
                    np.pad(weights, (0, rest), constant_values=-np.inf),
                    mixture,
                )
            some = likeliest(mixture, np.pad(wanted[part], (0, rest)), alternatives)
            found += some[: size - rest]
        return found

    def _read(self, expert: int) -> list[Float[np.ndarray, "P D"]]:
        model = self.pool.model
        read, _, _ = _compiled(model, self.pool.dtype)
        counts = [max(0, len(prompt) - 1) for prompt in self.prompts]
        found = [np.zeros((count, model.width), np.float32) for count in counts]
        groups: dict[int, list[Window]] = {}
        lengths, longest = [len(prompt) for prompt in self.prompts], self.pool.window
        for window in windows(lengths, longest + 1, self.pool.overlapping_stride):
            size = min(padded(max(window.size - 1, _SHORTEST)), longest)
            groups.setdefault(size, []).append(window)
        for size, group in groups.items():
            rows = next((rows for rows in _ROWS if rows >= len(group)), _ROWS[-1])
            for first in range(0, len(group), rows):
                part = group[first : first + rows]
                tokens = np.zeros((rows, size), np.int32)
                for row, one in enumerate(part):
                    ids = self.prompts[one.document][one.begin : one.end - 1]
                    tokens[row, : len(ids)] = ids
                states = np.asarray(read(self.pool.parameters[expert], tokens))
                for row, one in enumerate(part):
                    new = states[row, one.known - 1 - one.begin : one.end - 1 - one.begin]
                    found[one.document][one.known - 1 : one.end - 1] = new
        return found


@functools.lru_cache(maxsize=8)
def _compiled(model: ModelConfig, dtype: str) -> tuple[Any, Any, Any]:
    """Compiled functions: states of prompts; a mixture with one more model; log probabilities of
    tokens."""
    shape = inference_graph(model, dtype)

    def head_of(parameters):
        return bind(shape, parameters).output_head()

    @jax.jit
    def read(parameters, tokens):
        network = bind(shape, parameters)
        hidden = network.hidden(tokens)
        return network.output(hidden)[0].astype(jnp.float32)

    @functools.partial(jax.jit, donate_argnums=3)
    def add(parameters, states, log_weights, mixture):
        logits = head_of(parameters).logits(states.astype(dtype))
        return jnp.logaddexp(mixture, log_weights[:, None] + jax.nn.log_softmax(logits))

    @jax.jit
    def scored(parameters, states, wanted):
        return target_log_probabilities(states.astype(dtype), head_of(parameters), wanted)

    return read, add, scored
