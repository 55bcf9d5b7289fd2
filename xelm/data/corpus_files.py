"""Lists the files of a corpus with their languages, and the files that are skipped with reasons.

The name of a file, or of a folder around it, says its language: `sw.jsonl`, `swh_Latn/
train/000_00000.parquet`, `fr/fr_clean_0000.jsonl.gz`, `c4-sw.tfrecord-00000.json.gz`,
`20231101.sw/train-00000-of-00001.parquet`. No file is opened, except the list of
parts that `datasets` writes beside Arrow.
"""

import fnmatch
import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from clustering.errors import UserError
from clustering.languages import canonical
from xelm.data.corpus import Source
from xelm.data.path_names import (
    MAIN_SPLITS,
    OTHER_SPLITS,
    WHOLE_CORPUS,
    code_in,
    is_other_split,
    language_in,
)
from xelm.data.records import COMPRESSIONS, LINES, TABLES, format_of, stem

WANTED = f"{', '.join(LINES)} (or with {', '.join(COMPRESSIONS)}) or {' or '.join(TABLES)}"
# Why files are skipped; each completes "3 files ... were skipped".
HIDDEN = "with a name that begins with a dot"
UNKNOWN_FORMAT = "of an unknown format"
NO_FILE = "without content (a broken link or a special file)"
OTHER_SPLIT = "of a test or validation split"
LEFT_OUT = "that the language map leaves out"
OTHER_LANGUAGE = "in other languages"
UNKNOWN_LANGUAGE = "of an unknown language"
# Files without text that `datasets` writes beside Arrow.
_RECORDS_OF_ARROW = {"dataset_info.json", "state.json", "dataset_dict.json"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A file with text."""

    path: Path
    name: str
    """Its path within the corpus, with slashes."""
    language: str | None
    """Canonical tag of the language that the names say; None if they say none."""
    by_folder: bool = False
    """Whether a folder's name says the language, not the file's own. That is less certain, because
    any word may be the code of a language."""


@dataclass(slots=True)
class Listing:
    """Files of one source of a corpus."""

    files: list[Found] = field(default_factory=list)
    """Files with text, sorted by their paths."""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> names of the files skipped for it."""

    def skip(self, name: str, reason: str) -> None:
        """Records a file that is skipped."""
        self.skipped.setdefault(reason, []).append(name)


def list_files(source: Source) -> Listing:
    """The files of a folder and of the folders in it, of a pattern, or the one file that the path
    of `source` names; UserError if there is none."""
    root, paths, listing = Path(source.path), [], Listing()
    if root.is_file():
        if format_of(root.name) is None:
            raise UserError(f"{source.path} is no corpus file; wanted {WANTED}")
        root, paths = root.parent, [root]
    else:
        matched = [root] if root.is_dir() else [Path(p) for p in sorted(glob.glob(source.path))]
        if not matched:
            raise UserError(f"corpus {source.path} does not exist")
        root = root if root.is_dir() else _fixed_part(root)
        for path in matched:
            paths += _walk(path, root, listing) if path.is_dir() else [path]
    names = {path: path.relative_to(root).as_posix() for path in paths}
    kept = [path for path in paths if _is_text(path, names[path], listing)]
    for path in _training_part(kept, names, listing):
        name = PurePath(names[path])
        mapped, code = _mapped(name, root, source)
        if mapped and code is None:
            listing.skip(names[path], LEFT_OUT)
            continue
        own = canonical(code) if code else language_in(stem(name.name))
        language = own or next(_languages_around(name, root), None)
        by_folder = language is not None and own is None
        listing.files.append(
            Found(path=path.absolute(), name=names[path], language=language, by_folder=by_folder)
        )
    if not listing.files:
        more = f"; {passed}" if (passed := describe(listing.skipped)) else ""
        raise UserError(
            f"{source.path} has no corpus file; wanted <language>{LINES[0]} or another of "
            f"{WANTED}{more}"
        )
    return listing


def describe(skipped: Mapping[str, list[str]]) -> str:
    """Sentence with a clause for each reason for which files are skipped, with the first five
    names; for files in other languages, with the number of files in each language."""
    parts = []
    for reason, names in skipped.items():
        shown = names
        if reason == OTHER_LANGUAGE:
            shown = [f"{tag} ({count})" for tag, count in Counter(names).most_common()]
        more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
        files = "1 file" if len(names) == 1 else f"{len(names)} files"
        were = "was" if len(names) == 1 else "were"
        parts.append(f"{files} {reason} {were} skipped: {', '.join(shown[:5])}{more}")
    return "; ".join(parts)


def _fixed_part(pattern: Path) -> Path:
    """The folders of a pattern before its first wildcard."""
    parts = list(pattern.parts)
    first = next(n for n, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _walk(folder: Path, root: Path, listing: Listing) -> list[Path]:
    """All files below a folder, sorted, without hidden ones; links are followed, each folder
    once."""
    found, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in sorted([*names, *folders]):
            if name.startswith("."):
                hidden = (Path(here) / name).relative_to(root).as_posix()
                listing.skip(hidden, HIDDEN)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(here) / name for name in names if not name.startswith(".")]
        _check_parts(Path(here), names)
    return sorted(found)


def _check_parts(folder: Path, names: Iterable[str]) -> None:
    """Raises UserError where a file is missing that `datasets` wrote."""
    if "state.json" not in names or "dataset_info.json" not in names:
        return
    try:
        parts = json.loads((folder / "state.json").read_bytes())["_data_files"]
        written = [part["filename"] for part in parts]
    except (ValueError, KeyError, TypeError):
        return  # a file of another program
    missing = [name for name in written if name not in names]
    if missing:
        raise UserError(
            f"{folder / 'state.json'} names {missing[0]}, which is not there; copy the folder anew"
        )


def _is_text(path: Path, name: str, listing: Listing) -> bool:
    if path.name in _RECORDS_OF_ARROW and any(path.parent.rglob("*.arrow")):
        return False
    if format_of(path.name) is None:
        listing.skip(name, UNKNOWN_FORMAT)
        return False
    if not path.is_file():
        listing.skip(name, NO_FILE)
        return False
    return True


def _training_part(
    paths: list[Path], names: Mapping[Path, str], listing: Listing
) -> Iterator[Path]:
    """The paths without those of a test or validation split, unless there are no others."""
    others = {path for path in paths if is_other_split(names[path])}
    for path in paths:
        if path in others and len(others) < len(paths):
            listing.skip(names[path], OTHER_SPLIT)
        else:
            yield path


def _mapped(name: PurePath, root: Path, source: Source) -> tuple[bool, str | None]:
    """Whether the source assigns a language to a file, and which; None leaves the file out."""
    if source.language:
        return True, source.language
    for pattern, code in source.languages.items():
        if fnmatch.fnmatchcase(name.as_posix(), pattern):
            return True, code
    for part in [stem(name.name), *_folders(name, root)]:
        for name_or_code in (part, code_in(part)):
            if name_or_code in source.languages:
                return True, source.languages[name_or_code]
    return False, None


def _folders(name: PurePath, root: Path) -> list[str]:
    """Names of the folders around a file, from the innermost to that of the corpus."""
    root = root.absolute()
    more = [root.parent.name] if root.name.lower() in MAIN_SPLITS | OTHER_SPLITS else []
    return [*reversed(name.parts[:-1]), root.name, *more]


def _languages_around(name: PurePath, root: Path) -> Iterator[str]:
    """Tags of the languages that the folders around a file say, from the innermost outwards."""
    inside = len(name.parts) - 1
    for number, folder in enumerate(_folders(name, root)):
        if number >= inside and folder.lower() in WHOLE_CORPUS:
            continue
        if (language := language_in(folder)) is not None:
            yield language
