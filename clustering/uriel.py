"""URIEL feature vectors of languages, read from the data files of the installed `lang2vec` package.

Knows the files and the named feature sets of lang2vec 1.1 (Littell et al., EACL 2017,
aclanthology.org/E17-2002). Does not import lang2vec, whose import fails with setuptools >= 82, and
does not copy its data, which is CC-BY-SA-4.0.
"""

import functools
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from clustering import files
from clustering.errors import UserError
from clustering.languages import english_name, iso639_3

# Name -> (data file, source within it, prefix of its features), as in lang2vec's FEATURE_SETS_DICT.
# Left out: `id`, which holds nothing about relatives, and `learned`, which is a pickle.
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


def features(
    languages: Sequence[str], set_name: str = "syntax_average"
) -> tuple[Float[np.ndarray, "languages features"], tuple[str, ...]]:
    """Feature values in 0..1 with NaN for missing ones, and the names of the features.

    `languages` are canonical tags; several sets are joined by `+`. Raises UserError for an unknown
    set, and for languages of which the set knows nothing, all of them in one message.
    """
    codes = codes_with_data(languages, set_name)
    blocks: list[np.ndarray] = []
    names: list[str] = []
    for part in _parts(set_name):
        values, known, part_names = _read(part)
        rows = [known.index(codes[language]) for language in languages]
        blocks.append(values[rows].astype(np.float64))
        names += part_names
    joined = np.concatenate(blocks, axis=1)
    return np.where(joined == -1, np.nan, joined), tuple(names)


def codes_with_data(languages: Sequence[str], set_name: str = "syntax_average") -> dict[str, str]:
    """Tag -> the ISO 639-3 code of its features: the first of `languages.iso639_3` with any."""
    informed = frozenset.intersection(*(_informed(part) for part in _parts(set_name)))
    found = {tag: [code for code in iso639_3(tag) if code in informed] for tag in languages}
    without = [f"{tag} ({_what_it_has(tag)})" for tag, codes in found.items() if not codes]
    if without:
        raise UserError(f"URIEL has no {set_name} features for {', '.join(without)}")
    return {tag: codes[0] for tag, codes in found.items()}


def known(languages: Sequence[str], set_name: str) -> tuple[str, ...]:
    """Those of the canonical tags of which a set knows something."""
    informed = frozenset.intersection(*(_informed(part) for part in _parts(set_name)))
    return tuple(tag for tag in languages if informed.intersection(iso639_3(tag)))


def made_from(set_name: str) -> dict[str, str]:
    """Name -> version of lang2vec, or SHA-256 of the data files that a set is read from."""
    names = dict.fromkeys(FEATURE_SETS[part][0] for part in _parts(set_name))
    hashes = {name: files.sha256(_data_file(name)) for name in names}
    return {"lang2vec": _distribution().version} | hashes


def _parts(set_name: str) -> list[str]:
    parts = [part.strip() for part in set_name.split("+")]
    unknown = [part for part in parts if part not in FEATURE_SETS]
    if unknown:
        raise UserError(f"unknown feature set {unknown[0]!r}; there are {', '.join(FEATURE_SETS)}")
    return parts


def _what_it_has(tag: str) -> str:
    sets = [name for name in FEATURE_SETS if _informed(name) & set(iso639_3(tag))]
    return f"{english_name(tag)}, which has {', '.join(sets) if sets else 'none of any set'}"


@functools.lru_cache(maxsize=len(FEATURE_SETS))
def _informed(part: str) -> frozenset[str]:
    """Codes of which a set knows something."""
    values, known, _ = _read(part)
    return frozenset(known[row] for row in np.flatnonzero((values != -1).any(axis=1)))


# A measure asks for the same set several times.
@functools.lru_cache(maxsize=3)
def _read(part: str) -> tuple[np.ndarray, list[str], list[str]]:
    """Values [codes, features] with -1 for missing, the codes, the names of the features."""
    file_name, source, prefix = FEATURE_SETS[part]
    data = _unpacked(file_name)
    columns = np.flatnonzero(np.char.startswith(data["feats"], prefix))
    layer = data["sources"].tolist().index(source)
    names = [str(name).replace(" ", "_") for name in data["feats"][columns]]
    return data["data"][:, columns, layer], data["langs"].tolist(), names


# Sets of one file stand beside each other; families alone are 113 MB.
@functools.lru_cache(maxsize=1)
def _unpacked(file_name: str) -> dict[str, np.ndarray]:
    return files.read_arrays(_data_file(file_name))


def _data_file(name: str) -> Path:
    return Path(str(_distribution().locate_file(f"lang2vec/data/{name}")))


def _distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("lang2vec")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            "typology needs the URIEL data of the package lang2vec: pip install lang2vec"
        ) from error
