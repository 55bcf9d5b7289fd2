"""How probable tokens of given prompts are to an ensemble, and which tokens were likelier.

Prompts are read in overlapping windows, so that no model reads positions that its training had not.
Arrays as wide as the vocabulary exist for a few hundred tokens at a time; for all tokens that are
scored there are the states before the output head, D numbers a token and model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from xelm.inference.decoder import PIECES
from xelm.inference.piecewise import PiecewiseScorer
from xelm.inference.pool import Pool
from xelm.inference.route import Decision, Router, Walk, routing_mask
from xelm.inference.sampling import TokenLikelihood, likeliest
from xelm.inference.scoring import (
    Scorer,
    at_once,
    checked,
    final_states,
    in_own_vocabularies,
    states_and_scores,
)
from xelm.inference.work import Allowance, Work
from xelm.models.parameters import compiled_by_model
from xelm.models.products import by_rows_of


class PromptScores(NamedTuple):
    """How probable tokens of a prompt are to an ensemble."""

    tokens: list[TokenLikelihood]
    """One for each token that is scored."""
    weights: Mapping[str, float]
    """Model -> its mean weight over the tokens."""
    router: str
    """The router that decided most tokens."""


def score_prompts(
    pool: Pool,
    prompts: Sequence[Sequence[int]],
    routers: Sequence[Router],
    languages: Sequence[str | None],
    alternatives: int,
    scorer: PiecewiseScorer | None = None,
) -> Work[list[PromptScores]]:
    """Scores all tokens of prompts, which are ids and read as they are; the first id follows
    nothing, and its log probability is nan.

    routers, languages: one for each prompt, which is routed token by token. alternatives: number of
    likeliest tokens that are named at each place. scorer: reads the prompts in pieces; None: each
    model reads them at once."""
    ids = [np.asarray(prompt, np.int64) for prompt in prompts]
    walks = [
        Walk(router, language, own, np.arange(1, len(own)), routing_mask(pool.tokenizer, own))
        for own, router, language in zip(ids, routers, languages)
    ]
    found = yield from score_ends(pool, ids, walks, alternatives, scorer)
    return [
        one._replace(tokens=[TokenLikelihood(int(prompt[0]), float("nan"), ()), *one.tokens])
        for prompt, one in zip(prompts, found)
    ]


def score_ends(
    pool: Pool,
    prompts: Sequence[Int[np.ndarray, " _"]],
    walks: Sequence[Walk],
    alternatives: int,
    scorer: PiecewiseScorer | None = None,
) -> Work[list[PromptScores]]:
    """Scores the last tokens of prompts, one for each position of its walk; as `score_prompts`."""
    if not prompts:
        return []
    reading = pool.reading | {
        "text_format": replace(pool.tokenizer.text_format, start_id=None),
        "stride": pool.overlapping_stride,
    }
    models, width = range(len(pool.names)), pool.model.width
    wanted = [ids[len(ids) - len(walk.positions) :] for ids, walk in zip(prompts, walks)]
    ends = np.cumsum([0, *map(len, wanted)])
    states: dict[int, Float[np.ndarray, "N D"]] = {}
    scores = [np.zeros((len(models), len(ids))) for ids in prompts]
    score: Scorer = at_once if scorer is None else scorer

    def read(model: int, numbers: Sequence[int], *, scored: bool) -> Work[None]:
        if not numbers:
            return
        measure = states_and_scores if scored else final_states
        some = [prompts[n] for n in numbers]
        parameters = partial(pool.parameters.__getitem__, model)
        found = yield from score(pool.model, parameters, some, measure=measure, **reading)
        kept = states.setdefault(model, np.zeros((ends[-1], width), np.float32))
        for n, ids, own in zip(numbers, some, checked(pool.names[model], found)):
            # Without the end of the document, which is not scored.
            kept[ends[n] : ends[n + 1]] = own[len(ids) - len(wanted[n]) : len(ids), :width]
            if scored:
                scores[n][model] = own[: len(ids), -1]

    needing = [n for n, walk in enumerate(walks) if walk.needs_log_likelihoods]
    needed = [
        [n for n in needing if model < walks[n].router.experts and model not in pool.own]
        for model in models
    ]
    for model in models:
        yield from read(model, needed[model], scored=True)
    compared = yield from in_own_vocabularies(pool, walks, prompts, scores, reading, score)
    decisions = [
        walk.decide(own[: walk.router.experts], pool.limits, len(models))
        for walk, own in zip(walks, compared)
    ]
    for model in models:
        weighed = [np.isfinite(decision.log_weights[:, model]).any() for decision in decisions]
        others = sorted({*np.flatnonzero(weighed).tolist()} - {*needed[model]})
        yield from read(model, others, scored=False)
    log_weights = np.concatenate([decision.log_weights for decision in decisions])
    allowance = Allowance() if scorer is None else scorer.allowance
    tokens = np.concatenate(wanted)
    found = yield from _mixed(pool, states, tokens, log_weights, alternatives, allowance)
    return [
        PromptScores(found[first:last], _mean_weights(pool, decision), decision.router)
        for first, last, decision in zip(ends, ends[1:], decisions)
    ]


def _mean_weights(pool: Pool, decision: Decision) -> dict[str, float]:
    """Mean weight of each model over the positions of a prompt."""
    sums = np.exp(decision.log_weights).sum(axis=0)
    return dict(zip(pool.names, (sums / max(1, len(decision.log_weights))).tolist()))


def _mixed(
    pool: Pool,
    states: Mapping[int, Float[np.ndarray, "N D"]],
    wanted: Int[np.ndarray, " N"],
    log_weights: Float[np.ndarray, "N M"],
    alternatives: int,
    allowance: Allowance,
) -> Work[list[TokenLikelihood]]:
    """How probable each wanted token is by the mixture of models with these states. A token whose
    scores over the vocabulary are computed counts as one that is read."""
    largest = next((size for size in PIECES if size >= len(wanted)), PIECES[-1])
    add = _adder(pool.model, pool.compute_dtype)
    found: list[TokenLikelihood] = []
    while (first := len(found)) < len(wanted):
        yield from allowance.wait()
        most = max(PIECES[0], allowance.left / len(states))
        size = max(size for size in PIECES if size <= min(most, largest))
        allowance.left -= size * len(states)
        part = slice(first, first + size)
        rest = size - len(wanted[part])
        mixture = jnp.full((size, pool.model.vocabulary_size), -jnp.inf)
        for expert, own in sorted(states.items()):
            weights = log_weights[part, expert].astype(np.float32)
            if np.isfinite(weights).any():
                weights = np.pad(weights, (0, rest), constant_values=-np.inf)
                padded = np.pad(own[part], [(0, rest), (0, 0)])
                mixture = add(pool.parameters[expert], padded, weights, mixture)
        some = likeliest(mixture, np.pad(wanted[part], (0, rest)), alternatives)
        found += some[: size - rest]
    return found


@compiled_by_model(donate_argnums=3)
def _adder(network, states, log_weights, mixture):
    """A mixture of log probabilities [N, V] with one more model in it."""
    states = states.astype(network.compute_dtype)
    logits = network.output_head().logits(states, by_rows_of)
    return jnp.logaddexp(mixture, log_weights[:, None] + jax.nn.log_softmax(logits))
