"""Distances by common words, subwords, character n-grams or names in text.

Text is counted, and distances are made of the counts. Texts, ids and names are arguments: no files,
tokenizers or taggers are read here. Languages in different scripts have next to nothing in common
by any of these, however similar their grammar.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import regex
from jaxtyping import Float

from clustering.distances import Distances
from clustering.errors import UserError
from clustering.languages import canonical_all

Counts = Mapping[Any, int]
"""Unit (a word, an id, an n-gram, a name) -> how often it occurs."""

# Unicode's default word boundaries (UAX 29) need no spaces: Han characters are words of their own.
_BOUNDARY = regex.compile(r"(?V1)\b", regex.WORD)
_LETTER = regex.compile(r"\p{L}")


def words(texts: Iterable[str]) -> Counter[str]:
    """Counts of case-folded words with at least one letter, by Unicode's word boundaries (UAX
    29)."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word in _BOUNDARY.split(text.casefold()) if _LETTER.search(word))
    return counts


def characters(texts: Iterable[str], longest: int = 3) -> Counter[str]:
    """Counts of n-grams of 1 to `longest` characters within words, with an underscore at either end
    of a word (as in the profiles of Cavnar and Trenkle 1994)."""
    counts: Counter[str] = Counter()
    for word, times in words(texts).items():
        padded = f"_{word}_"
        for size in range(1, longest + 1):
            for start in range(len(padded) - size + 1):
                gram = padded[start : start + size]
                if gram != "_":
                    counts[gram] += times
    return counts


def subwords(documents: Iterable[np.ndarray]) -> Counter[int]:
    """Counts of subword ids in documents, integer arrays [tokens], of one tokenizer."""
    counts: Counter[int] = Counter()
    for ids in documents:
        distinct, times = np.unique(ids, return_counts=True)
        counts.update(dict(zip(distinct.tolist(), times.tolist())))
    return counts


def names(found: Iterable[str]) -> Counter[str]:
    """Counts of case-folded names of people, places and things, as a tagger found them."""
    return Counter(name.casefold() for name in found)


def text_distances(
    counts: Mapping[str, Counts], measure: str, made_from: dict[str, str] | None = None
) -> Distances:
    """Distances 1 - sum_u min(p_i(u), p_j(u)), where p_i(u) is the share of unit u in the text of
    i.

    This is the share of running text not in common: 0 for equal shares, 1 for no common unit. It
    suits words, subwords and characters. UserError for a language without any unit."""
    return _distances(counts, measure, made_from, _common_shares)


def type_distances(
    counts: Mapping[str, Counts], measure: str, made_from: dict[str, str] | None = None
) -> Distances:
    """Distances 1 - |U_i & U_j| / |U_i | U_j| between sets of units, however often these occur.

    It suits names: Pires et al. 2019, arXiv 1906.01502, section 4.1, measure the overlap of
    entities like this. It falls as texts grow, so they should be of similar size. UserError for a
    language without any unit."""
    return _distances(counts, measure, made_from, _common_types)


def _distances(
    counts: Mapping[str, Counts],
    measure: str,
    made_from: dict[str, str] | None,
    common: Callable[[Collection[Counts]], np.ndarray],
) -> Distances:
    tags = canonical_all(counts)
    empty = [tag for tag, found in zip(tags, counts.values()) if not found]
    if empty:
        raise UserError(f"no {measure} found in the text of {', '.join(empty)}")
    values = np.maximum(1.0 - common(counts.values()), 0.0)
    np.fill_diagonal(values, 0.0)
    units = [[int(sum(found.values())), len(found)] for found in counts.values()]
    return Distances(
        measure=measure,
        languages=tags,
        values=values,
        coverage=np.ones_like(values),
        parameters={"units": dict(zip(tags, units))},
        made_from=made_from or {},
    )


def _common_types(counts: Collection[Counts]) -> Float[np.ndarray, "languages languages"]:
    """Jaccard indices of the sets of units."""
    sets = [set(found) for found in counts]
    return np.array([[len(one & other) / len(one | other) for other in sets] for one in sets])


def _common_shares(counts: Collection[Counts]) -> Float[np.ndarray, "languages languages"]:
    """Sums over u of min(p_i(u), p_j(u))."""
    place: dict[Any, int] = {}
    for unit in chain.from_iterable(counts):
        place.setdefault(unit, len(place))
    # Rows of a CSR matrix, none of them empty.
    ends = np.cumsum([0, *map(len, counts)])
    indices = np.fromiter(map(place.__getitem__, chain(*counts)), np.int64)
    occurrences = np.fromiter(chain(*(found.values() for found in counts)), float)
    totals = np.array([sum(found.values()) for found in counts])
    shares = occurrences / np.repeat(totals, np.diff(ends))
    common = np.empty((len(counts),) * 2)
    for row in range(len(common)):
        mine = slice(ends[row], ends[row + 1])
        dense = np.zeros(len(place))
        dense[indices[mine]] = shares[mine]
        common[row] = np.add.reduceat(np.minimum(shares, dense[indices]), ends[:-1])
    return (common + common.T) / 2  # sums in two orders may differ in the last bit
