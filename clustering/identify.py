"""Language identification: the probable languages of a text, by its character n-grams.

The method is naive Bayes over hashed n-grams (Lui and Baldwin 2012, langid.py, has it over bytes).
A text's log likelihoods are sums over its characters, so a text that grows costs only its new part.
A new language is a new column; the others stay as they are. (`ngrams` is for clusters of documents:
its terms are in no order.)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from clustering.errors import UserError
from clustering.files import read_arrays, write_arrays

LONGEST = 4
"""Length in characters of the longest n-gram."""
BUCKETS = 1 << 16
"""Number of buckets; n-grams in one bucket count as one."""
_SMOOTHING = 0.5
"""Number added to the count of each bucket."""
_FEW = 32
"""Number of characters up to which n-grams are hashed one by one."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""2^64 by the golden ratio: its multiples spread over all high bits (Knuth, The Art of Computer
Programming, volume 3, section 6.4)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Identifier:
    """A language identifier for L languages, by character n-grams."""

    languages: tuple[str, ...]
    """Canonical tags."""
    log_likelihoods: Float[np.ndarray, "buckets L"]
    """Log likelihood of an n-gram in a bucket, by language; float32."""
    temperature: float = 1.0
    """Divisor of the sums before they become probabilities: neighbouring n-grams share characters,
    and so are not independent evidence."""

    def terms(self, before: str, pieces: Sequence[str]) -> Float[np.ndarray, "pieces L"]:
        """Log likelihoods of the languages that each piece of a text adds, by the n-grams that end
        in it; `before` is the text before the first piece, whose last characters count as
        context."""
        context = before[-(LONGEST - 1) :]
        if len(pieces) == 1 and len(pieces[0]) <= _FEW:  # as for each token of a text that grows
            buckets = _buckets_of_few(context, pieces[0])
            return self.log_likelihoods[buckets].sum(axis=0, dtype=float)[None]
        buckets, ends = _buckets(context + "".join(pieces))
        found = self.log_likelihoods[buckets].astype(float)
        # Sums up to each character, then up to each piece.
        sums = np.concatenate([np.zeros((1, len(self.languages))), np.cumsum(found, axis=0)])
        borders = np.cumsum([len(context), *map(len, pieces)])
        return np.diff(sums[np.searchsorted(ends, borders, side="right")], axis=0)

    def log_probabilities(self, text: str) -> Float[np.ndarray, " L"]:
        """Log probabilities of the languages for a text, under a uniform prior."""
        from scipy.special import log_softmax

        return log_softmax(self.terms("", [text])[0] / self.temperature)

    def calibrated(self, texts: Mapping[str, Iterable[str]]) -> "Identifier":
        """The identifier with the temperature under which these texts are most probable; they
        should not be those that it was fitted on."""
        from scipy.special import log_softmax

        labels, sums = [], []
        for tag, some in texts.items():
            for text in some:
                labels.append(self.languages.index(tag))
                sums.append(self.terms("", [text])[0])
        if not labels:
            return self

        def likelihood(divisor: float) -> float:
            found = log_softmax(np.asarray(sums) / divisor, axis=1)
            return float(found[np.arange(len(labels)), labels].mean())

        return replace(self, temperature=float(max(np.geomspace(0.5, 64, 43), key=likelihood)))

    def joined(self, other: "Identifier") -> "Identifier":
        """The identifier that knows the languages of another too, in columns behind its own."""
        columns = (self.log_likelihoods, other.log_likelihoods)
        return replace(
            self,
            languages=self.languages + other.languages,
            log_likelihoods=np.concatenate(columns, axis=1),
        )

    def without(self, languages: Iterable[str]) -> "Identifier":
        """The identifier without the columns of some languages; the others stay as they are."""
        gone = set(languages)
        kept = [column for column, tag in enumerate(self.languages) if tag not in gone]
        return replace(
            self,
            languages=tuple(self.languages[column] for column in kept),
            log_likelihoods=self.log_likelihoods[:, kept],
        )

    def save(self, path: Path) -> None:
        """Writes an .npz file, atomically."""
        arrays = {
            "languages": np.asarray(self.languages),
            "log_likelihoods": self.log_likelihoods,
            "temperature": np.asarray(self.temperature),
        }
        write_arrays(path, arrays)

    @classmethod
    def load(cls, path: Path) -> "Identifier":
        """The identifier of a file that `save` wrote; UserError if it is missing or damaged."""
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
    """An identifier fitted on texts of each language; UserError for a language without text.

    It is not calibrated: its temperature is the number of n-gram lengths, as if those of one length
    were independent."""
    columns = []
    for tag, some in texts.items():
        counts = np.zeros(BUCKETS)
        for text in some:
            counts += np.bincount(_buckets(text)[0], minlength=BUCKETS)
        if not counts.any():
            raise UserError(f"there is no text in {tag!r} to identify it by")
        smooth = counts + _SMOOTHING
        columns.append(np.log(smooth / smooth.sum()))
    return Identifier(
        languages=tuple(texts),
        log_likelihoods=np.stack(columns, axis=1).astype(np.float32),
        temperature=float(LONGEST),
    )


def _buckets_of_few(context: str, piece: str) -> list[int]:
    """Buckets of the n-grams that end in a short piece; `_buckets` would take ten times as long."""
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
    """Buckets of the n-grams of 1 to `LONGEST` characters in the order of their ends, and the
    number of characters up to each end."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    hashes, ends, rolling = [], [], np.zeros(len(codes), np.uint64)
    for length in range(1, LONGEST + 1):
        # From the hash of the n-gram one shorter that ends one character earlier.
        rolling = np.concatenate([np.zeros(1, np.uint64), rolling[:-1]])[: len(codes)]
        rolling = (rolling + codes + np.uint64(length)) * _MULTIPLIER
        hashes.append((rolling[length - 1 :] >> np.uint64(48)).astype(np.int64))
        ends.append(np.arange(length, len(codes) + 1))
    place = np.concatenate(ends)
    order = np.argsort(place, kind="stable")
    return np.concatenate(hashes)[order], place[order]
