"""Reads text tagged with parts of speech: CoNLL-U files, `<language>.conllu`, plain, gz or zst."""

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from clustering import files as hashes
from clustering.errors import UserError
from clustering.languages import canonical
from xelm.data.records import opened

SUFFIXES = (".conllu", ".conllu.gz", ".conllu.zst")


def files(folder: str | Path) -> dict[str, list[Path]]:
    """Canonical tag -> CoNLL-U files in that language; UserError for a folder without files, and
    for a file whose name is no language. Hidden files are skipped."""
    paths = sorted(
        path
        for path in Path(folder).glob("*")
        if path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")
    )
    if not paths:
        raise UserError(f"{folder} has no tagged text; wanted <language>{' or '.join(SUFFIXES)}")
    found: dict[str, list[Path]] = {}
    for path in paths:
        try:
            found.setdefault(canonical(path.name.split(".")[0]), []).append(path)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return found


def proper_nouns(paths: Iterable[Path]) -> Iterator[str]:
    """Names in files: runs of words tagged PROPN, as `New York`.

    Universal Dependencies gives this tag to names of people, places and things, which are the
    nearest to named entities in a tagging of parts of speech. UserError for a damaged file, and for
    a line that is not CoNLL-U.
    """
    for path in paths:
        yield from _proper_nouns(path)


def _proper_nouns(path: Path) -> Iterator[str]:
    name: list[str] = []
    for number, line in _lines(path):
        columns = line.split("\t")
        if len(columns) != 10 and line.strip() and not line.startswith("#"):
            raise UserError(f"{path}:{number}: ten columns of CoNLL-U wanted; got {line[:40]!r}")
        if "-" in columns[0] or "." in columns[0]:
            continue  # a contraction, whose parts follow, or a word that was left out
        if len(columns) == 10 and columns[3] == "PROPN":
            name.append(columns[1])
        elif name:
            yield " ".join(name)
            name = []
    if name:
        yield " ".join(name)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with opened(path) as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode().rstrip("\r\n")
    except (EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # an error of the disk, not of the text
        raise UserError(f"{path} is damaged: {error}") from error


def made_from(paths: Iterable[Path]) -> dict[str, str]:
    """Name of each file -> its SHA-256."""
    return {path.name: hashes.sha256(path) for path in paths}
