"""Filling masks: probable tokens behind the masks of a text, by an ensemble of encoders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from clustering.errors import UserError
from xelm.inference.blocks import padded
from xelm.inference.pool import Pool
from xelm.inference.route import Walk
from xelm.inference.scoring import check_ids, decide_along
from xelm.inference.work import finish
from xelm.models.parameters import compiled_by_model


class Guess(NamedTuple):
    """A token that may stand behind a mask."""

    text: str
    """Text of the token; one that begins with a space begins a word."""
    id: int
    """Id in the vocabulary."""
    probability: float
    """Probability by the ensemble."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Filling:
    """Probable tokens behind the masks of a text."""

    masks: Sequence[Sequence[Guess]]
    """Guesses for each mask, the most probable first."""
    weights: Mapping[str, float]
    """Model -> its routing weight."""
    routing: str
    """The router that decided."""


def fill(pool: Pool, text: str, count: int, language: str | None) -> Filling:
    """The `count` most probable tokens at each mask of a text, as `Ensemble.fill`."""
    tokenizer, model = pool.tokenizer, pool.model
    if count < 1:
        raise UserError(f"count must be at least 1; got {count}")
    if model.causal:
        raise UserError("these experts are decoders, which fill no masks; use generate")
    ids = np.asarray(tokenizer.encode_with_masks(text))
    framed = tokenizer.text_format.framed(ids)
    masks = np.flatnonzero(framed == tokenizer.mask_id)
    if not len(masks):
        raise UserError(f"the text has no {tokenizer.hub.mask_token} to be filled")
    check_ids(ids, model)
    if (excess := len(framed) - pool.window) > 0:
        raise UserError(
            f"the text has {len(ids)} tokens; this model, which reads {pool.window} at once, has "
            f"space for {len(ids) - excess}"
        )
    given = ids[ids != tokenizer.mask_id]
    walk = Walk(pool.router, language, given, np.asarray([len(given)]))
    (found,), *_ = finish(decide_along(pool, [walk], [given], pool.reading))
    (log_weights,) = found.log_weights
    size = min(padded(len(framed)), pool.window)  # few compiled shapes
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : len(framed)] = framed
    valid = np.arange(size)[None] < len(framed)
    places = np.resize(masks, size)  # repeated, for the same reason
    mixed = np.full((len(masks), model.vocabulary_size), -np.inf)
    read = _reader(model, pool.compute_dtype)
    for expert in np.flatnonzero(np.isfinite(log_weights)).tolist():
        own = np.asarray(read(pool.parameters[expert], tokens, valid, places))[: len(masks)]
        mixed = np.logaddexp(mixed, log_weights[expert] + own)
    best = np.argsort(-mixed, axis=1, kind="stable")[:, :count]
    return Filling(
        masks=[
            [Guess(tokenizer.piece(int(i)), int(i), float(np.exp(row[i]))) for i in chosen]
            for row, chosen in zip(mixed, best)
        ],
        weights=dict(zip(pool.names, np.exp(log_weights).tolist())),
        routing=found.router,
    )


@compiled_by_model()
def _reader(network, tokens, valid, places):
    """Log probabilities of all tokens at some places of the first row, [places, V]."""
    hidden = network.hidden(tokens, valid=valid)[0, places]
    return jax.nn.log_softmax(network.logits(hidden))
