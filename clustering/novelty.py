"""Novelty detection: whether a text is in none of the known languages, by a few running sums.

There are two margins of the likeliest language over the mean of all: per character, by the n-grams
of an `Identifier`, and per subword id, by counts of single ids. A text in an unknown language is a
little like many known ones and much like none. The margins of unknown languages are learned by
leaving each known language out in turn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from clustering.errors import UserError
from clustering.files import read_arrays, write_arrays
from clustering.identify import BUCKETS, Identifier

FEWEST = 3
"""Least number of known languages: with one left out, the others must still differ."""
SHORT = 32
"""Number of ids below which a text counts as short."""
MOST_FALSE = (0.2, 0.005)
"""Largest shares of beginnings of held-out texts in known languages that may count as unknown by
either margin: of those shorter than `SHORT` ids, and of the others. The shares fix the thresholds,
so that no text in an unknown language is needed. With a larger first share an unknown language is
noticed sooner; early mistakes on known languages cost little (docs/inference.md)."""
_SMOOTHING = 0.5
"""Number added to the count of each id."""
_HALF_TRUST = 20.0
"""Number of ids after which margins have half of their final weight."""
_LONG = 8
"""Number of ids from which on a beginning counts for the expected margins of its language."""

_ARRAYS = ("columns", "id_log_likelihoods", "expected", "weights", "thresholds")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Novelty:
    """Detector of texts in none of C known languages.

    A text's sums are, in this order: log likelihoods of its characters by language (C), those of
    its ids by language (C), its number of characters, its number of ids."""

    identifier: Identifier
    """Identifier of the known languages, and perhaps of others."""
    columns: Int[np.ndarray, " C"]
    """Positions of the known languages in the identifier."""
    id_log_likelihoods: Float[np.ndarray, "buckets C"]
    """Log likelihood of an id, modulo the number of buckets, by language; float32."""
    expected: Float[np.ndarray, "C 2"]
    """Mean margins of held-out texts in each language, per character and per id."""
    weights: Float[np.ndarray, "2 6"]
    """Weights of five features and a bias, for log odds by margins and by shares."""
    thresholds: Float[np.ndarray, "2 2"]
    """Log odds above which a text counts as unknown: by margins and by shares (rows), for texts
    shorter than `short` ids and for others (columns)."""
    short: int = SHORT
    """Number of ids from which on the second column of `thresholds` applies."""

    @property
    def size(self) -> int:
        """Number of a text's sums."""
        return 2 * len(self.columns) + 2

    def terms(
        self, before: str, pieces: Sequence[str], ids: Integer[np.ndarray, " T"]
    ) -> Float[np.ndarray, "T size"]:
        """Terms that each id and its characters add to the sums; `before` is the text before
        them."""
        characters = self.identifier.terms(before, pieces)[:, self.columns]
        places = np.asarray(ids, np.int64) % len(self.id_log_likelihoods)
        counts = np.asarray([[len(piece), 1] for piece in pieces], float).reshape(-1, 2)
        return np.concatenate([characters, self.id_log_likelihoods[places], counts], axis=1)

    def outside(self, sums: Float[np.ndarray, "T size"]) -> Bool[np.ndarray, " T"]:
        """Whether each text, given by its sums, is in none of the known languages."""
        thresholds = self.thresholds[:, (sums[:, -1] >= self.short).astype(int)]
        return (sums[:, -1] > 0) & (self._odds(sums) > thresholds).any(axis=0)

    def with_thresholds(
        self, sums: Float[np.ndarray, "N size"], short: int, most_false: tuple[float, float]
    ) -> "Novelty":
        """The detector with thresholds under which the shares `most_false` of texts in known
        languages with these sums, shorter than `short` ids and others, count as unknown by either
        margin."""
        is_short = sums[:, -1] < short
        found = np.zeros((2, 2))
        for row, odds in enumerate(self._odds(sums)):
            for column, rows in enumerate((is_short, ~is_short)):
                some = odds[rows] if rows.any() else odds  # where all are short, or none is
                found[row, column] = np.quantile(some, 1 - most_false[column])
        return replace(self, thresholds=found, short=short)

    def _odds(self, sums: Float[np.ndarray, "N size"]) -> Float[np.ndarray, "2 N"]:
        """Log odds that texts are in an unknown language, by margins and by shares."""
        margins, best = _margins(sums)
        both = (margins, _shares(margins, best, self.expected))
        features = [_features(values, sums[:, -1]) for values in both]
        return np.stack([x @ w[:-1] + w[-1] for x, w in zip(features, self.weights)])

    def save(self, path: Path) -> None:
        """Writes an .npz file, atomically, without the identifier, which has its own file."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        write_arrays(path, arrays | {"short": np.asarray(self.short)})

    @classmethod
    def load(cls, path: Path, identifier: Identifier) -> "Novelty":
        """The detector of a file that `save` wrote; UserError if it is missing or damaged."""
        arrays = read_arrays(path)
        try:
            found = {name: arrays[name] for name in _ARRAYS}
            return cls(identifier=identifier, short=int(arrays["short"]), **found)
        except KeyError as error:
            raise UserError(f"{path} is damaged: it lacks {error}") from error


def fit(
    identifier: Identifier,
    known: Sequence[str],
    pieces: list[str],
    texts: Mapping[str, Iterable[Integer[np.ndarray, " _"]]],
    held_out: Mapping[str, Iterable[Integer[np.ndarray, " _"]]],
) -> Novelty:
    """A detector fitted on texts in each `known` language, as subword ids.

    held_out: other texts, which the identifier was not fitted on either; those in its other
    languages are examples of unknown ones. pieces: the characters of each id. ValueError for fewer
    than `FEWEST` languages."""
    if len(known) < FEWEST:
        raise ValueError(f"there must be at least {FEWEST} languages; got {', '.join(known)}")
    columns = np.asarray([identifier.languages.index(tag) for tag in known])
    counts = np.zeros((min(BUCKETS, len(pieces)), len(known)))
    for column, tag in enumerate(known):
        for ids in texts[tag]:
            places = np.asarray(ids, np.int64) % len(counts)
            counts[:, column] += np.bincount(places, minlength=len(counts))
    smooth = counts + _SMOOTHING
    found = Novelty(
        identifier=identifier,
        columns=columns,
        id_log_likelihoods=np.log(smooth / smooth.sum(axis=0)).astype(np.float32),
        expected=np.ones((len(known), 2)),
        weights=np.zeros((2, 6)),
        thresholds=np.zeros((2, 2)),
    )
    sums, languages = beginnings(found, pieces, held_out)
    own = np.asarray([known.index(tag) if tag in known else -1 for tag in languages])
    order = np.argsort(own < 0, kind="stable")  # known languages first
    sums, own = sums[order], own[order]
    margins, best = _margins(sums)
    expected = _expected(margins, own, sums[:, -1], len(known))
    examples = [(margins, best, sums[:, -1], own < 0)]
    for column in range(len(known)):
        rows = sums[own == column]
        examples.append((*_margins(rows, column), rows[:, -1], np.ones(len(rows), bool)))
    margins, best, counts, unknown = map(np.concatenate, zip(*examples, strict=True))
    shares = _shares(margins, best, expected)
    weights = [_fitted(_features(some, counts), unknown) for some in (margins, shares)]
    found = replace(found, expected=expected, weights=np.stack(weights))
    return found.with_thresholds(sums[own >= 0], SHORT, MOST_FALSE)


def beginnings(
    novelty: Novelty, pieces: list[str], texts: Mapping[str, Iterable[Integer[np.ndarray, " _"]]]
) -> tuple[Float[np.ndarray, "N size"], list[str]]:
    """Sums of beginnings of texts, most of them short, and their languages."""
    draw, sums, languages = np.random.default_rng(0), [], []
    for tag, some in texts.items():
        for ids in some:
            ids = np.asarray(ids)[:512]  # margins of longer texts change little
            along = novelty.terms("", [pieces[i] for i in ids.tolist()], ids)
            drawn = [*draw.integers(1, len(ids) + 1, 4), *draw.geometric(0.1, 2)]
            lengths = np.unique(np.minimum(drawn, len(ids)))
            sums.append(np.cumsum(along, axis=0)[lengths - 1])
            languages += [tag] * len(lengths)
    return np.concatenate(sums), languages


def _margins(
    sums: Float[np.ndarray, "N size"], without: int | None = None
) -> tuple[Float[np.ndarray, "N 2"], Int[np.ndarray, "N 2"]]:
    """Margins of the likeliest language over the mean of all, per character and per id, and its
    position; `without` leaves a language out."""
    languages = sums.shape[1] // 2 - 1
    kept = np.asarray([column for column in range(languages) if column != without])
    margins, best = [], []
    for place in range(2):
        found = sums[:, place * languages + kept]
        counts = np.maximum(sums[:, 2 * languages + place], 1.0)
        margins.append((found.max(axis=1) - found.mean(axis=1)) / counts)
        best.append(kept[found.argmax(axis=1)])
    return np.stack(margins, axis=1), np.stack(best, axis=1)


def _expected(
    margins: Float[np.ndarray, "N 2"],
    own: Int[np.ndarray, " N"],
    counts: Float[np.ndarray, " N"],
    languages: int,
) -> Float[np.ndarray, "C 2"]:
    """Mean margins of each language; those of all languages if it has no long held-out text."""
    found = np.tile(margins[own >= 0].mean(axis=0), (languages, 1))
    for column in range(languages):
        rows = (own == column) & (counts >= _LONG)
        if rows.any():
            found[column] = margins[rows].mean(axis=0)
    return np.maximum(found, 1e-3)


def _shares(
    margins: Float[np.ndarray, "N 2"], best: Int[np.ndarray, "N 2"], expected: np.ndarray
) -> Float[np.ndarray, "N 2"]:
    """Margins as shares of the likeliest language's expected ones."""
    return margins / np.take_along_axis(expected, best, axis=0)


def _features(
    margins: Float[np.ndarray, "N 2"], counts: Float[np.ndarray, " N"]
) -> Float[np.ndarray, "N 5"]:
    """Margins, margins weighted by trust, and trust, which grows with the number of ids."""
    trust = (counts / (counts + _HALF_TRUST))[:, None]
    return np.concatenate([margins, margins * trust, trust], axis=1)


def _fitted(
    features: Float[np.ndarray, "N 5"], unknown: Bool[np.ndarray, " N"]
) -> Float[np.ndarray, " 6"]:
    """Weights and bias of a logistic regression on whether a text is in an unknown language."""
    from sklearn.linear_model import LogisticRegression

    scale = features.std(axis=0) + 1e-9
    model = LogisticRegression(C=1.0, max_iter=1000, class_weight="balanced")
    model.fit(features / scale, unknown)
    weights, bias = np.asarray(model.coef_)[0] / scale, np.asarray(model.intercept_)[0]
    return np.append(weights, bias)
