"""URIEL feature vectors of languages, read from the data files of the installed `lang2vec` package.

The files and the names of feature sets are those of lang2vec 1.1 (Littell et al., EACL 2017,
aclanthology.org/E17-2002). The package is not imported, since that fails with setuptools >= 82, and
its data are not copied, since they are under CC-BY-SA-4.0.
"""

import functools
import importlib.metadata
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from clustering import files
from clustering.errors import UserError
from clustering.languages import iso639_3, kindred_iso639_3

# Name -> (data file, source within it, prefix of its features), as in lang2vec's FEATURE_SETS_DICT.
# Without `id`, which has no information on relatives, and `learned`, which is a pickle.
FEATURE_SETS = {
    "syntax_wals": ("features.npz", "WALS", "S_"),
    "phonology_wals": ("features.npz", "WALS", "P_"),
    "syntax_sswl": ("features.npz", "SSWL", "S_"),
    "syntax_ethnologue": ("features.npz", "ETHNO", "S_"),
    "phonology_ethnologue": ("features.npz", "ETHNO", "P_"),
    "inventory_phoible_aa": ("features.npz", "PHOIBLE_AA", "INV_"),
    "inventory_phoible_gm": ("features.npz", "PHOIBLE_GM", "INV_"),
    "inventory_phoible_saphon": ("features.npz", "PHOIBLE_SAPHON", "INV_"),
    "inventory_phoible_spa": ("features.npz", "PHOIBLE_SPA", "INV_"),
    "inventory_phoible_ph": ("features.npz", "PHOIBLE_PH", "INV_"),
    "inventory_phoible_ra": ("features.npz", "PHOIBLE_RA", "INV_"),
    "inventory_phoible_upsid": ("features.npz", "PHOIBLE_UPSID", "INV_"),
    "syntax_knn": ("feature_predictions.npz", "predicted", "S_"),
    "phonology_knn": ("feature_predictions.npz", "predicted", "P_"),
    "inventory_knn": ("feature_predictions.npz", "predicted", "INV_"),
    "syntax_average": ("feature_averages.npz", "avg", "S_"),
    "phonology_average": ("feature_averages.npz", "avg", "P_"),
    "inventory_average": ("feature_averages.npz", "avg", "INV_"),
    "fam": ("family_features.npz", "FAM", ""),
    "geo": ("geocoord_features.npz", "GEOCOORDS", ""),
}
# Set whose gaps were filled by nearest neighbours -> the set of what was observed.
_OBSERVED_IN = {f"{name}_knn": f"{name}_average" for name in ("syntax", "phonology", "inventory")}


def features(
    languages: Sequence[str], set_name: str = "syntax_average"
) -> tuple[Float[np.ndarray, "languages features"], tuple[str, ...]]:
    """Feature values in 0..1, NaN if unknown, and the names of the features.

    `languages` are canonical tags; several sets are joined by `+`. A language without data in a set
    has NaN for all of its features. Raises UserError for an unknown set."""
    parts = _parts(set_name)
    names = [name for part in parts for name in _read(part)[2]]
    return _values(parts, languages, codes_with_data(languages, set_name)), tuple(names)


def codes_with_data(languages: Sequence[str], set_name: str = "syntax_average") -> dict[str, str]:
    """Tag -> the ISO 639-3 code whose features are used for it, for the languages that have any.

    URIEL often has a macrolanguage and its members as separate languages, of which one is described
    and the other is not: `zho` has one ancestor and `cmn` four, `aze` has 55 features and `azj`
    none. So the code with most observations is taken: among a language's own code and its usual
    member (`languages.iso639_3`); if these have none, among its macrolanguage or members
    (`languages.kindred_iso639_3`); if none has observations, the one with most predictions, in the
    same order. Of equal codes the first is taken. Raises UserError for an unknown set."""
    parts = _parts(set_name)
    # A gap that was filled says nothing of how well a code is described.
    observed = [_OBSERVED_IN.get(part, part) for part in parts]
    found: dict[str, str] = {}
    for tag in languages:
        for sets, codes in product((observed, parts), (iso639_3(tag), kindred_iso639_3(tag))):
            sizes = {code: [_sizes(part).get(code, 0) for part in sets] for code in codes}
            if described := [code for code in codes if all(sizes[code])]:
                found[tag] = max(described, key=lambda code: sum(sizes[code]))
                break
    return found


def known(languages: Sequence[str], set_name: str) -> tuple[str, ...]:
    """Those of the canonical tags for which a set has data."""
    found = codes_with_data(languages, set_name)
    return tuple(tag for tag in languages if tag in found)


def observed(
    languages: Sequence[str], set_name: str
) -> Bool[np.ndarray, "languages features"] | None:
    """Which values of `features` were observed, for sets whose gaps were filled by predictions
    (`_knn`); None for sets of observations alone."""
    parts = _parts(set_name)
    if not any(part in _OBSERVED_IN for part in parts):
        return None
    sets = [_OBSERVED_IN.get(part, part) for part in parts]
    return ~np.isnan(_values(sets, languages, codes_with_data(languages, set_name)))


def made_from(set_name: str) -> dict[str, str]:
    """Name -> version of lang2vec, or SHA-256 of the data files that a set is read from."""
    names = dict.fromkeys(FEATURE_SETS[part][0] for part in _parts(set_name))
    return {"lang2vec": _distribution().version} | {name: _sha256(name) for name in names}


def _parts(set_name: str) -> list[str]:
    parts = [part.strip() for part in set_name.split("+")]
    unknown = [part for part in parts if part not in FEATURE_SETS]
    if unknown:
        raise UserError(f"unknown feature set {unknown[0]!r}; there are {', '.join(FEATURE_SETS)}")
    return parts


def _values(
    parts: Sequence[str], languages: Sequence[str], codes: Mapping[str, str]
) -> Float[np.ndarray, "languages features"]:
    """Values of several sets for the codes of the languages; NaN if unknown."""
    blocks = []
    for values, places, names in map(_read, parts):
        block = np.full((len(languages), len(names)), -1.0)
        for row, language in enumerate(languages):
            if language in codes:
                block[row] = values[places[codes[language]]]
        blocks.append(block)
    found = np.concatenate(blocks, axis=1)
    return np.where(found == -1, np.nan, found)


@functools.lru_cache(maxsize=len(FEATURE_SETS))
def _sizes(part: str) -> dict[str, int]:
    """Number of values of a set for each code, or of ancestors in `fam`."""
    values, places, _ = _read(part)
    # An ancestor that a language lacks is written 0, which is known of every language of URIEL.
    counts = (values > 0 if part == "fam" else values != -1).sum(axis=1)
    return {code: int(counts[row]) for code, row in places.items()}


@functools.lru_cache(maxsize=len(FEATURE_SETS))
def _read(part: str) -> tuple[np.ndarray, dict[str, int], list[str]]:
    """Values [codes, features] with -1 for missing, the row of each code, names of features."""
    file_name, source, prefix = FEATURE_SETS[part]
    data = _unpacked(file_name)
    columns = np.flatnonzero(np.char.startswith(data["feats"], prefix))
    layer = data["sources"].tolist().index(source)
    names = [str(name).replace(" ", "_") for name in data["feats"][columns]]
    places = {code: row for row, code in enumerate(data["langs"].tolist())}
    values = data["data"][:, columns, layer]
    small = values.astype(np.int8)  # families are 0 or 1, and take a quarter of the memory
    return (small if (small == values).all() else values), places, names


# One file at a time, since families alone are 113 MB; the sets of a file are used together.
@functools.lru_cache(maxsize=1)
def _unpacked(file_name: str) -> dict[str, np.ndarray]:
    return files.read_arrays(_data_file(file_name))


@functools.cache
def _sha256(name: str) -> str:
    return files.sha256(_data_file(name))


def _data_file(name: str) -> Path:
    return Path(str(_distribution().locate_file(f"lang2vec/data/{name}")))


def _distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("lang2vec")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            "typology needs the URIEL data of the package lang2vec: pip install lang2vec"
        ) from error
