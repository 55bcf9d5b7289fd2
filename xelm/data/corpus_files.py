"""Lists the files of a corpus with their languages, and the files that are skipped with reasons.

The name of a file, or of a folder around it, says its language: `sw.jsonl`, `swh_Latn/
train/000_00000.parquet`, `c4-sw.tfrecord-00000.json.gz`, `20231101.sw/train-0-of-1.parquet`.
No file is opened, except the list of parts that `datasets` writes beside Arrow.
"""

import fnmatch
import glob
import itertools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from clustering.errors import UserError
from clustering.languages import canonical
from xelm.data.corpus import Source
from xelm.data.data_card import is_card
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


@dataclass(frozen=True, slots=True)
class Found:
    """A file with text."""

    path: Path
    name: str
    """Its path within the corpus, with slashes."""
    language: str | None
    """Canonical tag of the language that the names say; None if they say none."""
    by_folder: bool
    """Whether a folder's name says the language, which is less certain: any word may be a code."""


def list_files(source: Source) -> tuple[list[Found], dict[str, list[str]]]:
    """The files with text of a folder and of the folders in it, of a pattern, or the one file that
    the path of `source` names, sorted by their paths; and reason -> names of files skipped for it.
    UserError if there is no file with text."""
    root, paths, files = Path(source.path), [], []
    skipped: dict[str, list[str]] = defaultdict(list)
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
            paths += _walk(path, root, skipped) if path.is_dir() else [path]
    names = {path: path.relative_to(root).as_posix() for path in paths}
    kept = [path for path in paths if _is_text(path, names[path], skipped)]
    for path in _training_part(kept, names, skipped):
        name = PurePath(names[path])
        mapped, code = _mapped(name, root, source)
        if mapped and code is None:
            skipped[LEFT_OUT].append(names[path])
            continue
        own = canonical(code) if code else language_in(stem(name.name))
        language = own or next(_languages_around(name, root), None)
        by_folder = language is not None and own is None
        files.append(Found(path.absolute(), names[path], language, by_folder))
    if not files:
        more = f"; {passed}" if (passed := describe(skipped)) else ""
        raise UserError(
            f"{source.path} has no corpus file; wanted <language>{LINES[0]} or another of "
            f"{WANTED}{more}"
        )
    return files, skipped


def describe(skipped: Mapping[str, list[str]]) -> str:
    """Sentence with a clause for each reason for which files are skipped, with the first five
    names; for files in other languages, with the number of files in each language."""
    parts = []
    for reason, names in skipped.items():
        shown = names
        if reason == OTHER_LANGUAGE:
            shown = [f"{tag} ({count})" for tag, count in Counter(names).most_common()]
        more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
        files, were = ("1 file", "was") if len(names) == 1 else (f"{len(names)} files", "were")
        parts.append(f"{files} {reason} {were} skipped: {', '.join(shown[:5])}{more}")
    return "; ".join(parts)


def _fixed_part(pattern: Path) -> Path:
    """The folders of a pattern before its first wildcard."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _walk(folder: Path, root: Path, skipped: dict[str, list[str]]) -> list[Path]:
    """All files below a folder, sorted, without hidden ones; each linked folder once."""
    found, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in sorted([*names, *folders]):
            if name.startswith("."):
                skipped[HIDDEN].append((Path(here) / name).relative_to(root).as_posix())
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


def _is_text(path: Path, name: str, skipped: dict[str, list[str]]) -> bool:
    if path.name in _RECORDS_OF_ARROW and any(path.parent.rglob("*.arrow")):
        return False
    if is_card(path.name):
        return False
    if format_of(path.name) is None:
        skipped[UNKNOWN_FORMAT].append(name)
    elif not path.is_file():
        skipped[NO_FILE].append(name)
    else:
        return True
    return False


def _training_part(
    paths: list[Path], names: Mapping[Path, str], skipped: dict[str, list[str]]
) -> Iterator[Path]:
    """The paths without those of a test or validation split, unless there are no others."""
    others = {path for path in paths if is_other_split(names[path])}
    for path in paths:
        if path in others and len(others) < len(paths):
            skipped[OTHER_SPLIT].append(names[path])
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
