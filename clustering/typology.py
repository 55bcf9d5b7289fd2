"""Languages -> clusters of typologically similar languages, by URIEL features.

Knows the distance of X-ELM (Blevins et al. 2024, section 3.1; the authors' `lang_clustering.py`)
and which language is nearest to a new one. How groups form is `pairing`; where features come from
is `uriel`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from clustering import pairing, uriel
from clustering.clustering import Clustering, name_clusters
from clustering.errors import UserError
from clustering.languages import canonical, canonical_all


def distances(
    languages: Sequence[str], features: str = "syntax_average"
) -> Float[np.ndarray, "languages languages"]:
    """Cosine-like distances in 0..1 over the features that vary among the given languages.

    d(i, j) = 1 - sum_{f in both} x_if x_jf / sqrt(sum_{f in i} x_if^2 * sum_{f in j} x_jf^2), as in
    the authors' code: a feature that one of the two lacks counts in the other's length. Features
    that are 0, 1 or missing for all given languages are dropped (`minimal=True` of lang2vec), so a
    distance depends on who else is given. Raises UserError for unknown or repeated languages, for
    languages without data, and for pairs that share no feature.
    """
    tags = canonical_all(languages)
    values, _ = uriel.features(tags, features)
    values = values[:, _varies(values)]
    if values.shape[1] == 0:  # nothing tells them apart
        return np.zeros((len(tags), len(tags)))
    present = ~np.isnan(values)
    filled = np.where(present, values, 0.0)
    _check_comparable(tags, present, filled, features)
    lengths = np.sum(filled**2, axis=1)
    result = 1.0 - (filled @ filled.T) / np.sqrt(np.outer(lengths, lengths))
    # Against rounding: exactly symmetric, never below zero.
    result = np.maximum((result + result.T) / 2, 0.0)
    np.fill_diagonal(result, 0.0)
    return result


def cluster(
    languages: Sequence[str],
    k: int,
    *,
    balanced: bool = True,
    features: str = "syntax_average",
    exclude: Sequence[str] = (),
) -> Clustering:
    """k clusters of similar languages, with the tree that made them.

    `balanced` keeps sizes within one of each other, at the price of some distant pairs; otherwise
    sizes are as they fall. Languages in `exclude` are recorded as unassigned. Raises UserError as
    `distances` does, if k is not in 1..languages, and if every language is excluded.
    """
    left_out = canonical_all(exclude)
    tags = tuple(tag for tag in canonical_all(languages) if tag not in left_out)
    if left_out and not tags:
        raise UserError(f"every language is excluded: {', '.join(left_out)}")
    made_from = uriel.made_from(features)  # before what can only be wrong with the languages
    try:
        matrix = distances(tags, features)
    except UserError as error:
        raise UserError(f"{error}; exclude them, or assign them to clusters by hand") from error
    grouping = (pairing.balanced if balanced else pairing.free)(tags, matrix, k)
    return Clustering(
        method="typology",
        parameters={
            "k": k,
            "balanced": balanced,
            "features": features,
            "uriel_codes": uriel.codes_with_data(tags, features),
        },
        clusters=name_clusters(grouping.groups),
        unassigned=left_out,
        languages=tags,
        distances=matrix,
        merges=tuple(grouping.merges),
        made_from=made_from,
    )


def nearest(
    language: str, others: Sequence[str], features: str = "syntax_average"
) -> list[tuple[str, float]]:
    """The other languages with their distances, nearest first; ties in the given order.

    Features are dropped over the union of all, so with very few others the ranking rests on few
    features. Used for growing: the parent of a new language's expert is the expert of the nearest
    one (X-ELM section 5, HMR).
    """
    new = canonical(language)
    known = [tag for tag in canonical_all(others) if tag != new]
    if not known:
        raise UserError(f"no language to compare {new} with; got {', '.join(others) or 'none'}")
    row = distances([new, *known], features)[0, 1:]
    return [(known[index], float(row[index])) for index in np.argsort(row, kind="stable")]


def _varies(values: Float[np.ndarray, "languages features"]) -> np.ndarray:
    """Columns not all 0, all 1 or all missing; constant fractions stay, as in lang2vec."""
    constant = (values == 0).all(axis=0) | (values == 1).all(axis=0) | np.isnan(values).all(axis=0)
    return ~constant


def _check_comparable(
    tags: tuple[str, ...], present: np.ndarray, filled: np.ndarray, features: str
) -> None:
    silent = [tag for tag, row in zip(tags, filled, strict=True) if not row.any()]
    shared = present.astype(np.int64) @ present.T.astype(np.int64)
    rows, columns = np.nonzero(np.triu(shared == 0, k=1))
    apart = [f"{tags[i]}-{tags[j]}" for i, j in zip(rows, columns, strict=True)]
    if silent or apart:
        named = ", ".join((silent + apart)[:5])
        raise UserError(
            f"no {features} feature that varies over these {len(tags)} languages "
            f"can compare {named}"
        )
