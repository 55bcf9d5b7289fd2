"""Masked-language-model training: which tokens of a batch are hidden, and behind what."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

# Of the chosen tokens, so many become the mask and so many a random id; the rest stay as they are
# (Devlin et al. 2019, section 3.1).
MASKED, RANDOM = 0.8, 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Masking:
    """What masked training needs to know of a tokenizer."""

    mask_id: int
    """The id that stands for a hidden token."""
    usual_ids: Int[np.ndarray, " _"]
    """Ids of no special token, ascending: these alone are hidden or put in place of others."""


def masked_per_row(length: int, share: float) -> int:
    """Of the tokens of a row."""
    return max(1, round(length * share))


def mask_tokens(
    batch: Mapping[str, np.ndarray],
    masking: Masking,
    share: float,
    random_seed: int,
    step: int,
) -> dict[str, np.ndarray]:
    """The batch with "inputs" (tokens, some of them hidden), "places" (columns of those to be
    predicted, as many in each row: `masked_per_row`) and "chosen" (bool: whether there is one at a
    place; rows with padding have fewer). A pure function of its arguments: a resumed training hides
    the same tokens.

    Rows overlap by one token, which is left to the next row: arrays get [rows, T] from [rows, T+1].
    """
    random = np.random.default_rng([random_seed, step])
    kept = {k: v[:, :-1] for k, v in batch.items() if k in ("tokens", "segments", "positions")}
    tokens = kept["tokens"]
    length = tokens.shape[1]
    nearest = np.searchsorted(masking.usual_ids, tokens).clip(max=len(masking.usual_ids) - 1)
    plain = (kept["segments"] > 0) & (masking.usual_ids[nearest] == tokens)
    # In random order, those that may be hidden first.
    order = np.argsort(np.where(plain, random.random(tokens.shape), 2.0), axis=1, kind="stable")
    places = order[:, : masked_per_row(length, share)]
    counts = np.ceil(plain.sum(axis=1) * share)
    chosen = np.arange(places.shape[1])[None] < counts[:, None]
    fate = random.random(places.shape)
    others = masking.usual_ids[random.integers(0, len(masking.usual_ids), places.shape)]
    given = np.take_along_axis(tokens, places, axis=1)
    given = np.where(chosen & (fate < MASKED), masking.mask_id, given)
    given = np.where(chosen & (fate >= MASKED) & (fate < MASKED + RANDOM), others, given)
    inputs = tokens.copy()
    np.put_along_axis(inputs, places, given.astype(tokens.dtype), axis=1)
    return {
        **batch,
        **kept,
        "inputs": inputs,
        "places": places.astype(np.int32),
        "chosen": chosen,
    }
