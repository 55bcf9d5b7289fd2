"""Held-out documents: those of a corpus that no training reads, on which trainings are measured."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int, UInt64

from xelm.config import HeldOutConfig
from xelm.data.rows import LanguageShare
from xelm.data.store import TokenizedLanguage

_MOST = 0.2
"""Largest share of a language's documents that is held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingText:
    """Documents of one training by language."""

    sources: list[LanguageShare]
    """Documents to train on."""
    held_out: list[LanguageShare]
    """Documents to measure it on; languages without any are missing."""

    @property
    def tokens(self) -> int:
        """Number of tokens of one pass, special tokens included."""
        return sum(source.tokens for source in self.sources)

    @property
    def share(self) -> float:
        """Sum of the shares of the sources."""
        return sum(source.share for source in self.sources)


def held_out(ids: TokenizedLanguage, config: HeldOutConfig) -> Int[np.ndarray, " documents"]:
    """Numbers of the documents of a language that are held out: those with the smallest hashes of
    their text, so that it does not depend on the order of a corpus, and copies stay together. One
    that is too long is not among them, so that no more is held out than a third of the tokens."""
    count = max(config.share * len(ids), min(config.least_documents, _MOST * len(ids)))
    count = round(count) if config.share else 0
    if not count:
        return np.empty(0, np.int64)
    hashes = np.asarray(ids.hashes[:, 0])
    last = np.partition(hashes, count - 1)[count - 1]
    smallest = np.flatnonzero(hashes <= last)
    smallest = smallest[np.argsort(hashes[smallest], kind="stable")]
    left, chosen = min(config.most_tokens, len(ids.ids) // 3), []
    lengths = ids.lengths[smallest]
    # Copies, which are kept or left out together, follow one another.
    starts = np.flatnonzero(np.diff(hashes[smallest], prepend=hashes[smallest[0]] + np.uint64(1)))
    for start, end in zip(starts, [*starts[1:], len(smallest)]):
        tokens = int(lengths[start:end].sum())
        if tokens <= left:
            left -= tokens
            chosen.append(smallest[start:end])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


def held_out_hashes(
    texts: Iterable[TokenizedLanguage], config: HeldOutConfig
) -> UInt64[np.ndarray, " documents"]:
    """Hashes of the documents that are held out in any of these texts."""
    found = [np.asarray(ids.hashes[held_out(ids, config), 0]) for ids in texts]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *found]))


def divide(
    sources: Sequence[LanguageShare],
    config: HeldOutConfig,
    elsewhere: UInt64[np.ndarray, " documents"] | None = None,
) -> TrainingText:
    """The documents of some sources, divided into those to train on and those held out. A source
    has the same share of either. Copies of what is held out in another of these sources, or has one
    of the hashes `elsewhere`, are in neither part."""
    hashes = held_out_hashes([source.ids for source in sources], config)
    if elsewhere is not None:
        hashes = np.union1d(hashes, elsewhere)
    training, measured = [], []
    for source in sources:
        away, kept = np.zeros((2, len(source.ids)), bool)
        away[held_out(source.ids, config)] = True
        kept[:] = ~np.isin(source.ids.hashes[:, 0], hashes) if len(hashes) else True
        own = np.arange(len(away)) if source.documents is None else source.documents
        if kept[own].all():
            training.append(source)
        elif kept[own].any():
            training.append(replace(source, documents=own[kept[own]]))
        if away[own].any():
            measured.append(replace(source, documents=own[away[own]]))
    return TrainingText(sources=training, held_out=measured)
