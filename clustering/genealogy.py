"""Family trees of languages, by URIEL's `fam` (Glottolog's families as lang2vec carries them)."""

from collections.abc import Sequence

import numpy as np

from clustering import uriel
from clustering.distances import Distances
from clustering.languages import canonical_all


def distances(languages: Sequence[str]) -> Distances:
    """1 - 2 c / (a + b) for languages with a and b ancestors, c of them in common.

    So it is 0 for languages with the same ancestors, and 1 for languages of different families. A
    language without ancestors in URIEL is an isolate, unclassified, or not described; which of
    these the data do not tell, so its distances are unknown.
    """
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


def lineage(language: str) -> list[str]:
    """Names of the groups that a language belongs to, from family down; empty for isolates and
    for languages that URIEL does not place."""
    values, names = uriel.features(canonical_all([language]), "fam")
    return [names[i].removeprefix("F_").replace("_", " ") for i in np.flatnonzero(values[0] > 0)]
