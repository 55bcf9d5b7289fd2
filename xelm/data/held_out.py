"""Held-out documents: those of a corpus that no training reads, on which trainings are measured."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

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
    their text, so that it does not depend on the order of a corpus, and copies stay together."""
    count = max(config.share * len(ids), min(config.least_documents, _MOST * len(ids)))
    count = round(count) if config.share else 0
    if not count:
        return np.empty(0, np.int64)
    hashes = np.asarray(ids.hashes[:, 0])
    smallest = np.argpartition(hashes, count - 1)[:count]
    smallest = smallest[np.argsort(hashes[smallest], kind="stable")]
    fitting = np.cumsum(ids.lengths[smallest]) <= config.most_tokens
    return np.sort(smallest[: max(1, int(fitting.sum()))])


def divide(sources: Iterable[LanguageShare], config: HeldOutConfig) -> TrainingText:
    """The documents of some sources, divided into those to train on and those held out. A source
    has the same share of either."""
    training, measured = [], []
    for source in sources:
        away = np.zeros(len(source.ids), bool)
        away[held_out(source.ids, config)] = True
        own = np.arange(len(away)) if source.documents is None else source.documents
        if not away[own].any():
            training.append(source)
            continue
        if not away[own].all():
            training.append(replace(source, documents=own[~away[own]]))
        measured.append(replace(source, documents=own[away[own]]))
    return TrainingText(sources=training, held_out=measured)
