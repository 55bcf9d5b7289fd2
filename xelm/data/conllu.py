"""Reads text tagged with parts of speech: CoNLL-U files, `<language>.conllu`, plain, gz or zst."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from clustering import files as hashes
from clustering.errors import UserError
from clustering.languages import canonical
from xelm.data.records import DamagedFile, opened

SUFFIXES = (".conllu", ".conllu.gz", ".conllu.zst")


def files(folder: str | Path) -> dict[str, list[Path]]:
    """Canonical tag -> CoNLL-U files in that language; UserError for a folder without files, and
    for a file whose name is no language. Hidden files are skipped."""
    paths = sorted(p for p in Path(folder).glob("[!.]*") if p.name.lower().endswith(SUFFIXES))
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
    """Names in files: runs of words tagged PROPN, as `New York`. Universal Dependencies gives this
    tag to names of people, places and things, which are the nearest to named entities in a tagging
    of parts of speech. UserError for a damaged file, and for a line that is not CoNLL-U."""
    for path in paths:
        name: list[str] = []
        for place, line in _lines(path):
            columns = line.split("\t")
            if len(columns) != 10 and line.strip() and not line.startswith("#"):
                raise UserError(f"{place}: ten columns of CoNLL-U wanted; got {line[:40]!r}")
            if "-" in columns[0] or "." in columns[0]:
                continue  # a contraction, whose parts follow, or a word that was left out
            if len(columns) == 10 and columns[3] == "PROPN":
                name.append(columns[1])
            elif name:
                yield " ".join(name)
                name = []


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines with their places, and an empty one, as after every sentence."""
    try:
        with opened(path) as file:
            for number, line in enumerate(file, 1):
                yield f"{path}:{number}", line.decode("utf-8-sig").rstrip("\r\n")
        yield "", ""
    except (DamagedFile, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def made_from(paths: Iterable[Path]) -> dict[str, str]:
    """Name of each file -> its SHA-256."""
    return {path.name: hashes.sha256(path) for path in paths}
