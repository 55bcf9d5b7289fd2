"""Families, and distances by family tree, from URIEL's set `fam` (Glottolog's families as lang2vec
has them)."""

import difflib
from collections.abc import Sequence

import numpy as np

from clustering import uriel
from clustering.distances import Distances
from clustering.errors import UserError
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


def of_family(family: str, languages: Sequence[str]) -> list[str]:
    """Those of the languages that descend from a family or a branch of one, such as Turkic or North
    Germanic, in their order; capitals, spaces, hyphens and underscores do not matter. UserError for
    a family that URIEL does not know."""
    tags = canonical_all(languages)
    values, names = uriel.features(tags, "fam")
    known = {_plain(name.removeprefix("F_")): place for place, name in enumerate(names)}
    place = known.get(_plain(family))
    if place is None:
        near = difflib.get_close_matches(_plain(family), known, 1)
        guess = f"; the nearest is {names[known[near[0]]][2:].replace('_', ' ')}" if near else ""
        raise UserError(f"URIEL knows no language family {family!r}{guess}")
    return [tag for tag, value in zip(tags, values[:, place]) if value > 0]


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())
