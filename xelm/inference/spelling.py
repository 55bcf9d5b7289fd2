"""A text in the ids of another vocabulary than the one in which a pool reads it.

A router that compares models by log-likelihoods compares what each gives to the same text in its
own vocabulary. A model may spell a text in several ways, and what it gives to one of them is a
lower bound of what it gives to the text. The spelling that counts is its tokenizer's segmentation
of the text that is known when the router first decides, a prompt or context. Each token after
that is spelled by itself, so that a spelling only grows, and never depends on what follows."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from xelm.data.vocabulary import Vocabulary


class Spelling(NamedTuple):
    """A text in the ids of another vocabulary."""

    ids: Int[np.ndarray, " T1"]
    """The ids."""
    places: Int[np.ndarray, " T1"]
    """For each of them the number of the token of the text with which its characters end."""


def spell(
    ids: Int[np.ndarray, " T"],
    vocabulary: Vocabulary | None,
    own: Vocabulary | None,
    known: int = 0,
    mask: Bool[np.ndarray, " T"] | None = None,
) -> Spelling:
    """The spelling of a text in another vocabulary: the first `known` tokens as that vocabulary's
    tokenizer segments them, each further token as the seed's ids that it stands for, which are ids
    of every vocabulary.

    vocabulary, own: those of `ids` and of the result; None is the seed's. mask: tokens that a
    router goes by; no piece has characters of some that count and of some that do not."""
    ids = np.asarray(ids, np.int64)
    counts = np.ones(len(ids), np.int64) if vocabulary is None else vocabulary.counts(ids)
    base = ids if vocabulary is None else vocabulary.expand(ids)
    places = np.repeat(np.arange(len(ids)), counts)
    if own is None:
        return Spelling(base, places)
    size = int(counts[:known].sum())
    groups = None if mask is None else np.asarray(mask, int)[places[:size]]
    segmented, ends = own.segment(base[:size], groups)
    return Spelling(
        np.concatenate([segmented, base[size:]]), np.concatenate([places[ends], places[size:]])
    )
