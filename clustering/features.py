"""Distances between the rows of a table of features by language, in which values may be missing."""

import difflib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer

from clustering.errors import UserError

Table = Float[np.ndarray, "languages features"]
"""Values of features; NaN if unknown."""
Distance = Float[np.ndarray, "languages languages"]
"""Distances; 0 from a language to itself, NaN if unknown."""


def chosen(names: Sequence[str], only: Sequence[str], where: str) -> list[int]:
    """Positions of the features `only` in `names`; of all features if `only` is empty. UserError
    for one that is not there; `where` names the table in the message."""
    if not only:
        return list(range(len(names)))
    unknown = [name for name in only if name not in names]
    if unknown:
        alike = difflib.get_close_matches(unknown[0], names, n=3)
        hint = f"; did you mean {', '.join(alike)}?" if alike else ""
        raise UserError(f"{where} has no feature {unknown[0]}{hint}")
    return [names.index(name) for name in dict.fromkeys(only)]


def varying(values: Table) -> Bool[np.ndarray, " features"]:
    """Whether each column is other than all 0, all 1 or all missing, which lang2vec calls minimal;
    constant fractions stay, as there."""
    return ~np.all([values == 0, values == 1, np.isnan(values)], axis=1).any(axis=0)


def compared(
    values: Table, names: Sequence[str], only: Sequence[str], where: str, resample: int | None
) -> Integer[np.ndarray, " compared"]:
    """Positions of the columns to compare languages by: those that vary, and are in `only` if it is
    not empty. With `resample`, as many columns drawn with replacement by that random seed
    (bootstrap)."""
    places = np.array(chosen(names, only, where), int)
    places = places[varying(values[:, places])]
    if resample is None or not len(places):
        return places
    return np.random.default_rng(resample).choice(places, len(places))


def coverage(known: Bool[np.ndarray, "languages features"]) -> Distance:
    """Share of the features known for both languages, and on the diagonal for one; 1 where the
    table has no features."""
    count = known.shape[1]
    present = known.astype(np.float64)
    return (present @ present.T) / count if count else np.ones((len(known),) * 2)


def cosine(values: Table) -> Distance:
    """d(i, j) = 1 - sum_{f in both} x_if x_jf / sqrt(sum_{f in i} x_if^2 * sum_{f in j} x_jf^2).

    As in the code of X-ELM's authors, a feature that one of the two lacks counts in the other's
    length. NaN where no feature is known for both, and where a language has only zeros; 0 where
    the table has no features."""
    if not values.shape[1]:
        return np.zeros((len(values),) * 2)
    present = (~np.isnan(values)).astype(np.float64)
    filled = np.nan_to_num(values)
    lengths = np.sum(filled**2, axis=1)
    with np.errstate(invalid="ignore"):
        result = 1.0 - (filled @ filled.T) / np.sqrt(np.outer(lengths, lengths))
    return _tidied(np.where(present @ present.T > 0, result, np.nan))


def gower(values: Table) -> Distance:
    """Mean difference over the features known for both, each scaled to 0..1 over the given
    languages (Gower 1971). It suits numbers of any kind, and zeros count like other values.
    Features with one value for all are left out. NaN where no feature is known for both; 0 without
    features."""
    missing = np.isnan(values)
    low = np.where(missing, np.inf, values).min(axis=0, initial=np.inf)
    span = np.where(missing, -np.inf, values).max(axis=0, initial=-np.inf) - low
    scaled = (values[:, span > 0] - low[span > 0]) / span[span > 0]
    if not scaled.shape[1]:
        return np.zeros((len(values),) * 2)
    present = ~np.isnan(scaled)
    filled = np.nan_to_num(scaled)
    result = np.empty((len(values),) * 2)
    for row, (mine, known) in enumerate(zip(filled, present)):  # row by row, to save memory
        both = present & known
        with np.errstate(invalid="ignore"):
            result[row] = (np.abs(filled - mine) * both).sum(axis=1) / both.sum(axis=1)
    return _tidied(result)


def _tidied(values: np.ndarray) -> np.ndarray:
    """The distances made exactly symmetric and never negative, against rounding errors."""
    result = np.maximum((values + values.T) / 2, 0.0)
    np.fill_diagonal(result, 0.0)
    return result
