"""Family trees of languages, by URIEL's `fam` (Glottolog's families as lang2vec carries them)."""

from collections.abc import Sequence

import numpy as np

from clustering import uriel
from clustering.distances import Distances
from clustering.languages import canonical_all


def distances(languages: Sequence[str]) -> Distances:
    """1 - 2 c / (a + b) for languages with a and b ancestors, c of them in common.

    So it is 0 for languages with the same ancestors, and 1 for languages of different families. A
    language without ancestors is an isolate, or unclassified, and as far as can be from all others:
    URIEL does not tell them apart. Raises UserError for languages that URIEL does not have.
    """
    tags = canonical_all(languages)
    ancestors = np.nan_to_num(uriel.features(tags, "fam")[0])
    counts = ancestors.sum(axis=1)
    both = counts[:, None] + counts
    shared = ancestors @ ancestors.T
    values = 1.0 - np.divide(2 * shared, both, out=np.zeros_like(both), where=both > 0)
    np.fill_diagonal(values, 0.0)
    return Distances(
        measure="genealogy",
        languages=tags,
        values=values,
        coverage=np.ones_like(values),
        parameters={
            "uriel_codes": uriel.codes_with_data(tags, "fam"),
            "without_relatives": [tag for tag, count in zip(tags, counts) if not count],
        },
        made_from=uriel.made_from("fam"),
    )


def lineage(language: str) -> list[str]:
    """Names of the groups that a language belongs to, from family down; empty for isolates."""
    values, names = uriel.features(canonical_all([language]), "fam")
    return [names[i].removeprefix("F_").replace("_", " ") for i in np.flatnonzero(values[0] > 0)]
