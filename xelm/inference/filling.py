"""What stands behind the masks of a text, by an ensemble of encoders."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clustering.errors import UserError
from xelm.inference.routing import among, states_along, weights_along
from xelm.inference.scoring import check_ids, score_documents
from xelm.models.config import ModelConfig
from xelm.models.parameters import bind, inference_graph

if TYPE_CHECKING:
    from xelm.inference.ensemble import Ensemble


class Guess(NamedTuple):
    """What may stand behind a mask."""

    text: str
    """A token as it reads; with a space before it, the beginning of a word."""
    id: int
    """Its number in the vocabulary."""
    probability: float
    """By the ensemble."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Filling:
    """What an ensemble sees behind the masks of a text."""

    masks: Sequence[Sequence[Guess]]
    """For each mask, the most probable first."""
    weights: Mapping[str, float]
    """Expert -> its routing weight."""
    routing: str
    """The router that decided."""


def fill(ensemble: "Ensemble", text: str, count: int, language: str | None) -> Filling:
    """As `Ensemble.fill`."""
    tokenizer, model = ensemble.tokenizer, ensemble.model
    if count < 1:
        raise UserError(f"count must be at least 1; got {count}")
    if model.causal:
        raise UserError("these experts are decoders, which fill no masks; use generate")
    ids = np.asarray(tokenizer.encode_with_masks(text))
    masks = np.flatnonzero(ids == tokenizer.mask_id)
    if not len(masks):
        raise UserError(f"the text has no {tokenizer.hub.mask_token} to be filled")
    check_ids(ids, model)
    framed = np.concatenate([tokenizer.start_ids, ids, [tokenizer.end_id]]).astype(np.int64)
    longest, more = ensemble.window, len(framed) - len(ids)
    if len(framed) > longest:
        raise UserError(
            f"the text has {len(ids)} tokens; this model, which reads {longest} at once, has room "
            f"for {longest - more}"
        )
    log_weights, routing = _weights(ensemble, ids[ids != tokenizer.mask_id], language)
    # Padded to a power of two: few compiled shapes.
    size = min(1 << int(len(framed) - 1).bit_length(), longest)
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : len(framed)] = framed
    valid = np.arange(size)[None] < len(framed)
    places = np.resize(masks + 1, size)  # repeated, for the same reason
    mixed = np.full((len(masks), model.vocabulary_size), -np.inf)
    for expert in np.flatnonzero(np.isfinite(log_weights)):
        found = _filler(model, ensemble.dtype)(
            ensemble.parameters[int(expert)], tokens, valid, places
        )
        mixed = np.logaddexp(mixed, log_weights[expert] + np.asarray(found)[: len(masks)])
    best = np.argsort(-mixed, axis=1, kind="stable")[:, :count]
    return Filling(
        masks=[
            [Guess(tokenizer.piece(int(i)), int(i), float(np.exp(row[i]))) for i in chosen]
            for row, chosen in zip(mixed, best)
        ],
        weights=dict(zip(ensemble.names, np.exp(log_weights).tolist())),
        routing=routing,
    )


def _weights(ensemble: "Ensemble", ids: np.ndarray, language: str | None) -> tuple[np.ndarray, str]:
    """Log weights of the experts after all that can be read of a text, and the router that
    decided."""
    router, count = ensemble.router, ensemble.router.experts
    states = states_along(router, router.start(language), ids)
    scores = np.zeros((count, len(ids)))
    if router.asks(states[-1:]).any():
        scores = np.stack(
            [
                score_documents(
                    ensemble.model,
                    ensemble.parameters[expert],
                    [ids],
                    start_id=ensemble.tokenizer.start_id,
                    end_id=ensemble.tokenizer.end_id,
                    context_length=ensemble.window,
                    mask_id=ensemble.tokenizer.mask_id,
                    dtype=ensemble.dtype,
                )[0]
                for expert in range(count)
            ]
        )
    end, least = np.asarray([len(ids)]), ensemble.least_weight
    found = weights_along(router, states, scores, end, ensemble.top_m, least)
    return among(found, len(ensemble.names))[0], router.decided_by(states[-1:])[0]


@functools.lru_cache(maxsize=8)
def _filler(model: ModelConfig, dtype: str):
    shape = inference_graph(model, dtype)

    @jax.jit
    def guess(parameters, tokens, valid, places):
        network = bind(shape, parameters)
        valid = jnp.asarray(valid)
        hidden = network.hidden(jnp.asarray(tokens), valid=valid)[0, places]
        return jax.nn.log_softmax(network.logits(hidden))

    return guess
