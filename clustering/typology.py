"""Languages -> how similar their grammar and sounds are, by URIEL features, and clusters of them.

Knows the distance of X-ELM (Blevins et al. 2024, section 3.1; the authors' `lang_clustering.py`).
How groups form is `grouping`; where features come from is `uriel`; what a distance makes of missing
values is `features`.
"""

from collections.abc import Sequence

import numpy as np

from clustering import features as tables
from clustering import grouping, uriel
from clustering.clustering import Clustering
from clustering.distances import Distances, Relative
from clustering.errors import UserError
from clustering.languages import canonical, canonical_all, without


def distances(
    languages: Sequence[str],
    features: str = "syntax_average",
    only: Sequence[str] = (),
    *,
    resample: int | None = None,
) -> Distances:
    """Cosine-like distances in 0..1 over the features that vary among the given languages.

    As in the authors' code (`features.cosine`). Features that are 0, 1 or missing for all given
    languages are dropped (`minimal=True` of lang2vec), so a distance depends on who else is given.
    `features` names sets of URIEL (`uriel.FEATURE_SETS`), joined by `+`; `only` keeps those of the
    given names. `resample` draws as many of them with replacement by that random seed, which shows
    how much hangs on single ones. Coverage is the share of the features that are known. Raises
    UserError for unknown or repeated languages, for languages without data, and for pairs that
    share no feature.
    """
    tags = canonical_all(languages)
    values, names = uriel.features(tags, features)
    values = tables.compared(values, names, only, features, resample)
    _check_comparable(tags, values, features)
    return Distances(
        measure="typology",
        languages=tags,
        values=tables.cosine(values),
        coverage=tables.coverage(values),
        parameters={
            "features": features,
            "only": list(only),
            "resample": resample,
            "features_that_vary": values.shape[1],
            "uriel_codes": uriel.codes_with_data(tags, features),
        },
        made_from=uriel.made_from(features),
    )


def cluster(
    languages: Sequence[str],
    k: int,
    *,
    rule: str = "pairs",
    features: str = "syntax_average",
    exclude: Sequence[str] = (),
) -> Clustering:
    """k clusters of languages with similar features, by one of `grouping.RULES`.

    Languages in `exclude` are recorded as unassigned. Raises UserError as `distances` and
    `grouping.cluster` do.
    """
    tags, left_out = without(languages, exclude)
    uriel.made_from(features)  # before what can only be wrong with the languages
    try:
        measured = distances(tags, features)
    except UserError as error:
        raise UserError(f"{error}; exclude them, or assign them to clusters by hand") from error
    return grouping.cluster(measured, k, rule=rule, unassigned=left_out)


def nearest(
    language: str, others: Sequence[str], features: str = "syntax_average"
) -> list[Relative]:
    """The other languages, nearest first; of equals, the one given first.

    Features are dropped over the union of all, so with very few others the ranking rests on few
    features. Used for growing: the parent of a new language's expert is the expert of the nearest
    one (X-ELM section 5, HMR).
    """
    new = canonical(language)
    known = [tag for tag in canonical_all(others) if tag != new]
    if not known:
        raise UserError(f"no language to compare {new} with; got {', '.join(others) or 'none'}")
    return distances([new, *known], features).relatives(new)


def _check_comparable(tags: tuple[str, ...], values: tables.Table, features: str) -> None:
    present = ~np.isnan(values)
    silent = ~np.any(present & (values != 0), axis=1) & bool(values.shape[1])
    shared = present.astype(np.int64) @ present.T.astype(np.int64)
    rows, columns = np.nonzero(np.triu((shared == 0) & bool(values.shape[1]), k=1))
    named = [tag for tag, nothing in zip(tags, silent) if nothing]
    named += [f"{tags[i]}-{tags[j]}" for i, j in zip(rows, columns)]
    if named:
        raise UserError(
            f"no {features} feature that varies over these {len(tags)} languages "
            f"can compare {', '.join(named[:5])}; the sets _knn have no gaps"
        )
