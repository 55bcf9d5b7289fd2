"""Distances by grammar and sounds, from URIEL features, and clusters of languages by them.

The distance is that of X-ELM (Blevins et al. 2024, section 3.1; the authors' `lang_clustering.py`).
The features come from `uriel`, the rules of clustering are in `grouping`, and missing values are
handled by `features`.
"""

from collections.abc import Sequence

import numpy as np

from clustering import features as tables
from clustering import grouping, uriel
from clustering.clustering import Clustering
from clustering.distances import Distances
from clustering.errors import UserError
from clustering.languages import canonical_all, without


def distances(
    languages: Sequence[str],
    features: str = "syntax_average",
    only: Sequence[str] = (),
    *,
    resample: int | None = None,
) -> Distances:
    """Cosine-like distances in 0..1 over the features that vary among the given languages.

    They are as in the authors' code (`features.cosine`). Features that are 0, 1 or missing for all
    given languages are dropped (`minimal=True` of lang2vec), so a distance depends on the other
    languages. `features`: sets of URIEL (`uriel.FEATURE_SETS`), joined by `+`. `only`: these
    features alone. `resample`: draws as many features with replacement by that random seed, which
    shows how much the distances depend on single ones. Coverage is the share of features observed
    for both: the sets `_knn` have no gaps, but their gaps are filled by predictions. A language
    without data in a set, and a pair without a common feature, are at an unknown distance. Raises
    UserError for unknown or repeated languages."""
    tags = canonical_all(languages)
    described = uriel.known(tags, features)  # the others do not decide which features vary
    values, names = uriel.features(described, features)
    places = tables.compared(values, names, only, features, resample)
    values, observed = values[:, places], uriel.observed(described, features)
    distances = tables.cosine(values)
    known = ~np.isnan(values) if observed is None else observed[:, places]
    return Distances(
        measure="typology",
        languages=described,
        values=distances,
        coverage=np.where(np.isnan(distances), 0.0, tables.coverage(known)),
        parameters={
            "features": features,
            "only": list(only),
            "resample": resample,
            "features_that_vary": values.shape[1],
            "uriel_codes": uriel.codes_with_data(described, features),
        },
        made_from=uriel.made_from(features),
    ).spread(tags)


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
    `grouping.cluster` do."""
    tags, left_out = without(languages, exclude)
    measured = distances(tags, features)
    try:
        measured.complete()
    except UserError as error:
        raise UserError(
            f"{error} in {features}; the sets _knn have no gaps. Or exclude such languages, or "
            "assign them to clusters by hand"
        ) from error
    return grouping.cluster(measured, k, rule=rule, unassigned=left_out)
