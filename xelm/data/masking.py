"""Masks tokens of batches for masked-language-model training."""

from collections.abc import Mapping

import numpy as np

from xelm.data.text_format import TextFormat
from xelm.training_config import TrainConfig

# Shares of the chosen tokens that become the mask and a random id; the others stay as they are
# (Devlin et al. 2019, section 3.1).
MASKED, RANDOM = 0.8, 0.1


def masked_per_row(length: int, share: float) -> int:
    """Largest number of tokens that are masked in a row of this length."""
    return max(1, round(length * share))


def mask_tokens(
    batch: Mapping[str, np.ndarray], config: TrainConfig, text_format: TextFormat, step: int
) -> dict[str, np.ndarray]:
    """The batch with "inputs" (tokens, some of them masked), "places" (columns of the tokens to be
    predicted, `masked_per_row` in each row) and "chosen" (bool: whether a place is used; rows with
    padding have fewer). A pure function of its arguments: a resumed training masks the same tokens.

    Rows overlap by one token, which is left to the next row: arrays of [rows, T+1] become [rows,
    T].
    """
    mask_id, ordinary_ids = text_format.mask_id, text_format.ordinary_ids
    assert mask_id is not None and ordinary_ids is not None  # an encoder's tokenizer has both
    share, random = config.data.mask_share, np.random.default_rng([config.random_seed, step])
    kept = {k: v[:, :-1] for k, v in batch.items() if k in ("tokens", "segments", "positions")}
    tokens = kept["tokens"]
    length = tokens.shape[1]
    nearest = np.searchsorted(ordinary_ids, tokens).clip(max=len(ordinary_ids) - 1)
    plain = (kept["segments"] > 0) & (ordinary_ids[nearest] == tokens)
    # In random order, with the tokens that may be masked first.
    order = np.argsort(np.where(plain, random.random(tokens.shape), 2.0), axis=1, kind="stable")
    places = order[:, : masked_per_row(length, share)]
    counts = np.ceil(plain.sum(axis=1) * share)
    chosen = np.arange(places.shape[1])[None] < counts[:, None]
    fate = random.random(places.shape)
    others = ordinary_ids[random.integers(0, len(ordinary_ids), places.shape)]
    given = np.take_along_axis(tokens, places, axis=1)
    given = np.where(chosen & (fate < MASKED), mask_id, given)
    given = np.where(chosen & (fate >= MASKED) & (fate < MASKED + RANDOM), others, given)
    inputs = tokens.copy()
    np.put_along_axis(inputs, places, given.astype(tokens.dtype), axis=1)
    masked = {"inputs": inputs, "places": places.astype(np.int32), "chosen": chosen}
    return {**batch, **kept, **masked}
