"""Texts -> the languages they are probably in, by the n-grams of their characters.

Knows naive Bayes over hashed n-grams (Lui and Baldwin 2012, langid.py, has it over bytes), so that
what a text says of its language is a sum over its characters, and a text that grows costs no more
than what is new of it. A new language is a new column; the others stay as they are. Knows nothing
of experts. `ngrams` is for clusters of documents: its terms are in no order.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from clustering.errors import UserError
from clustering.files import read_arrays, write_arrays

LONGEST = 4
"""Characters of the longest n-gram."""
BUCKETS = 1 << 16
"""N-grams that fall into one bucket are one term."""
_SMOOTHING = 0.5
"""Added to the count of each bucket."""
_FEW = 32
"""Characters."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""2^64 by the golden ratio: its multiples spread over all high bits (Knuth, The Art of Computer
Programming, volume 3, section 6.4)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Identifier:
    """What n-grams say of L languages."""

    languages: tuple[str, ...]
    """Canonical tags."""
    log_likelihoods: Float[np.ndarray, "buckets L"]
    """float32; of an n-gram in a bucket, in each language."""
    temperature: float = 1.0
    """Sums are divided by this before they become probabilities: neighbouring n-grams share
    characters, and count as several witnesses of the same thing."""

    def terms(self, before: str, pieces: Sequence[str]) -> Float[np.ndarray, "pieces L"]:
        """What each piece of a text adds to the log likelihoods of the languages, by the n-grams
        that end in it; `before` is the text before the first, of which the last characters are
        looked at."""
        context = before[-(LONGEST - 1) :]
        if len(pieces) == 1 and len(pieces[0]) <= _FEW:  # as texts grow, for each token
            buckets = _buckets_of_few(context, pieces[0])
            return self.log_likelihoods[buckets].sum(axis=0, dtype=float)[None]
        buckets, ends = _buckets(context + "".join(pieces))
        found = self.log_likelihoods[buckets].astype(float)
        # Sums up to each character, then up to each piece.
        sums = np.concatenate([np.zeros((1, len(self.languages))), np.cumsum(found, axis=0)])
        borders = np.cumsum([len(context), *map(len, pieces)])
        return np.diff(sums[np.searchsorted(ends, borders, side="right")], axis=0)

    def log_probabilities(self, text: str) -> Float[np.ndarray, " L"]:
        """Of the languages, all alike beforehand."""
        sums = self.terms("", [text])[0] / self.temperature
        top = sums.max()
        return sums - top - np.log(np.exp(sums - top).sum())

    def calibrated(self, texts: Mapping[str, Iterable[str]]) -> "Identifier":
        """With the temperature under which texts of known languages, not those that it was fitted
        on, are most probable."""
        labels, sums = [], []
        for tag, some in texts.items():
            for text in some:
                labels.append(self.languages.index(tag))
                sums.append(self.terms("", [text])[0])
        if not labels:
            return self
        best = min(
            np.geomspace(0.5, 64, 43),
            key=lambda temperature: _surprise(np.asarray(sums) / temperature, np.asarray(labels)),
        )
        return replace(self, temperature=float(best))

    def save(self, path: Path) -> None:
        """As an .npz file, atomically."""
        arrays = {
            "languages": np.asarray(self.languages),
            "log_likelihoods": self.log_likelihoods,
            "temperature": np.asarray(self.temperature),
        }
        write_arrays(path, arrays)

    @classmethod
    def load(cls, path: Path) -> "Identifier":
        """UserError if the file is missing or damaged."""
        arrays = read_arrays(path)
        try:
            return cls(
                languages=tuple(arrays["languages"].tolist()),
                log_likelihoods=arrays["log_likelihoods"],
                temperature=float(arrays["temperature"]),
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: it lacks {error}") from error


def fit(texts: Mapping[str, Iterable[str]]) -> Identifier:
    """From texts of each language; UserError for a language without any. Not calibrated: n-grams of
    so many lengths are taken for as many witnesses of one thing."""
    columns = []
    for tag, some in texts.items():
        counts = np.zeros(BUCKETS)
        for text in some:
            counts += np.bincount(_buckets(text)[0], minlength=BUCKETS)
        if not counts.any():
            raise UserError(f"there is no text in {tag!r} to know it by")
        smooth = counts + _SMOOTHING
        columns.append(np.log(smooth / smooth.sum()))
    return Identifier(
        languages=tuple(texts),
        log_likelihoods=np.stack(columns, axis=1).astype(np.float32),
        temperature=float(LONGEST),
    )


def _surprise(sums: Float[np.ndarray, "N L"], labels: Int[np.ndarray, " N"]) -> float:
    """Mean of -log p of the languages that texts are in."""
    top = sums.max(axis=1, keepdims=True)
    totals = top[:, 0] + np.log(np.exp(sums - top).sum(axis=1))
    return float((totals - sums[np.arange(len(labels)), labels]).mean())


def _buckets_of_few(context: str, piece: str) -> list[int]:
    """As `_buckets`, of the n-grams that end in a piece: for so few, arrays take ten times as
    long."""
    found: list[int] = []
    before: list[int] = []  # hashes of what ends one character earlier, by length
    for place, code in enumerate(map(ord, context + piece)):
        shorter = [0, *before[: LONGEST - 1]]
        before = [
            (rolling + code + length) * int(_MULTIPLIER) % 2**64
            for length, rolling in enumerate(shorter, 1)
        ]
        if place >= len(context):
            found += [rolling >> 48 for rolling in before]
    return found


def _buckets(text: str) -> tuple[Int[np.ndarray, " ngrams"], Int[np.ndarray, " ngrams"]]:
    """Buckets of the n-grams of 1 to `LONGEST` characters, by where they end, ascending; and the
    number of characters up to each one's end."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    hashes, ends, rolling = [], [], np.zeros(len(codes), np.uint64)
    for length in range(1, LONGEST + 1):
        # Of the n-gram that ends one character earlier and is one shorter, and this character.
        rolling = np.concatenate([np.zeros(1, np.uint64), rolling[:-1]])[: len(codes)]
        rolling = (rolling + codes + np.uint64(length)) * _MULTIPLIER
        hashes.append((rolling[length - 1 :] >> np.uint64(48)).astype(np.int64))
        ends.append(np.arange(length, len(codes) + 1))
    place = np.concatenate(ends)
    order = np.argsort(place, kind="stable")
    return np.concatenate(hashes)[order], place[order]
