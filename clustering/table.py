"""Distances by a table of numbers about languages, from a CSV file.

The file has a header with the names of features, then a line for each language, its code first. How
missing values count is in `features`.
"""

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clustering import features, files
from clustering.distances import Distances
from clustering.errors import UserError
from clustering.languages import canonical_all

MISSING = ("", "?", "-", "na", "n/a", "nan", "none")
"""Words, in any case, for an unknown value."""


def read(path: str | os.PathLike[str]) -> tuple[tuple[str, ...], features.Table, tuple[str, ...]]:
    """Canonical tags, values [languages, features] with NaN if unknown, and names of features.

    Columns are separated by commas, semicolons or tabs, whichever the header has most of. UserError
    for text in place of a number, lines of different lengths, unknown or repeated languages, and
    repeated features."""
    header, lines = _lines(path)
    names = tuple(name.strip() for name in header[1:])
    if not names or not all(names) or all(map(_is_number, names)):
        raise UserError(f"{path} must have a header with the names of features; got {header}")
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise UserError(f"{path} has several columns {', '.join(twice[:5])}")
    rows = []
    for number, line in lines:
        place = f"{path}:{number}"
        if len(line) != len(header):
            raise UserError(f"{place}: the header has {len(header)} columns; got {len(line)}")
        rows.append([_number(text, f"{place}, {name}") for name, text in zip(names, line[1:])])
    if not rows:
        raise UserError(f"{path} has no line after the header")
    try:
        tags = canonical_all([line[0].strip() for _, line in lines])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return tags, np.array(rows), names


def distances(
    path: str | os.PathLike[str],
    languages: Sequence[str] | None = None,
    *,
    only: Sequence[str] = (),
    resample: int | None = None,
) -> Distances:
    """Distances between the languages of a table, or some of them (`features.gower`).

    `only`: these features alone. `resample`: as in `typology.distances`. Features that do not vary
    among the languages are dropped, so a distance depends on the other languages. Coverage is the
    share of known features. Languages without a line, and pairs without a common feature, are at an
    unknown distance. UserError as `read`, for a feature that is not in the table, and if none of
    the languages is."""
    tags, values, names = read(path)
    wanted = tags if languages is None else canonical_all(languages)
    described = [tag for tag in wanted if tag in tags]
    if not described:
        raise UserError(f"{path} has no line for {', '.join(wanted[:5])}")
    values = values[[tags.index(tag) for tag in described]]
    values = values[:, features.compared(values, names, only, str(path), resample)]
    found = features.gower(values)
    return Distances(
        measure=Path(path).stem,
        languages=tuple(described),
        values=found,
        coverage=np.where(np.isnan(found), 0.0, features.coverage(~np.isnan(values))),
        parameters={
            "metric": "gower",
            "only": list(only),
            "resample": resample,
            "features_that_vary": values.shape[1],
        },
        made_from={Path(path).name: files.sha256(path)},
    ).spread(wanted)


def _lines(path: str | os.PathLike[str]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and the other lines that are not empty, with their numbers."""
    text = files.read_text(path)
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    rows = csv.reader(text.splitlines(), delimiter=delimiter)
    found = [(rows.line_num, row) for row in rows if any(cell.strip() for cell in row)]
    return (found[0][1] if found else []), found[1:]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text: str, place: str) -> float:
    if text.strip().casefold() in MISSING:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if not math.isfinite(value):
        raise UserError(f"{place}: must be a number, or empty if unknown; got {text!r}")
    return value
