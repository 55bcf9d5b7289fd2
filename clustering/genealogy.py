"""Distances by family tree, from URIEL's set `fam` (Glottolog's families as lang2vec has them)."""

from collections.abc import Sequence

import numpy as np

from clustering import uriel
from clustering.distances import Distances
from clustering.languages import canonical_all


def distances(languages: Sequence[str]) -> Distances:
    """Distances 1 - 2 c / (a + b) between languages with a and b ancestors, of which c are common.

    They are 0 for languages with the same ancestors, and 1 for languages of different families. A
    language without ancestors in URIEL is an isolate, unclassified, or not described; the data do
    not distinguish these, so its distances are unknown."""
    tags = canonical_all(languages)
    ancestors = np.nan_to_num(uriel.features(tags, "fam")[0])
    counts = ancestors.sum(axis=1)
    known = (counts > 0)[:, None] & (counts > 0)
    values = np.full(known.shape, np.nan)
    np.divide(2 * (ancestors @ ancestors.T), counts[:, None] + counts, out=values, where=known)
    values = 1.0 - values
    np.fill_diagonal(values, 0.0)
    return Distances(
        measure="genealogy",
        languages=tags,
        values=values,
        coverage=known.astype(float),
        parameters={
            "uriel_codes": uriel.codes_with_data(tags, "fam"),
            "without_ancestors": [tag for tag, count in zip(tags, counts) if not count],
        },
        made_from=uriel.made_from("fam"),
    )
