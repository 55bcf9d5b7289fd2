"""Hashes of a RUN's other files that inference reads: configuration, clusters, vectoriser, fitted
routers, and the dense baseline.

The registry has the hashes of the seed and of every expert. Other files are written by several
commands at different times; each records what it wrote here, and `verify` compares. The record of
an expert in the registry is hashed here too when it is published, since it never changes after.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from clustering.errors import UserError
from clustering.files import read_json, remove_unfinished, sha256, write_json
from experts.expert import SEED, Expert, check_types, hash_faults, parse_reference
from experts.lock import locked
from experts.registry import Registry

FILE_NAME = "hashes.json"
FORMAT = 1
FILES = ("run.json", "clusters.json", "clusters.npz", "vectoriser.npz", "assignments.npz")
"""Files of the RUN's own folder that are recorded."""
MERGES, STUDENTS, MIXES = "merges", "students", "mixes"
"""Folders of merged models, of distilled ones, and of mixtures of experts, one folder each."""
COMBINED = (MERGES, STUDENTS, MIXES)
"""Folders of all models that are made of several experts."""
FOLDERS = ("dense", "routers", *COMBINED)
"""Folders whose files are recorded."""


def recorded(run: Path | str) -> dict[str, str]:
    """File, relative to the RUN -> hexadecimal SHA-256; empty before anything is recorded.
    UserError if the manifest is damaged."""
    return _read(run)["files"]


def recorded_experts(run: Path | str) -> dict[str, str]:
    """Reference of each published version -> the `digest` of its record; UserError if the manifest
    is damaged."""
    return _read(run)["experts"]


def digest(expert: Expert, registry: Registry) -> str:
    """SHA-256 of the part of an expert's record that never changes once it is published: all but
    its status and the version that it replaced, with the names that it, its parent and its donor
    had when they were published. registry: has these."""
    name, version = parse_reference(expert.first_reference)
    facts = expert.to_json() | {"name": name, "version": version}
    for key in ("parent", "donor"):
        if facts[key] not in (None, SEED):
            facts[key] = registry.expert(*parse_reference(facts[key])).first_reference
    changing = ("status", "replaces", "published_as", *expert.more)
    kept = {key: facts[key] for key in facts if key not in changing and facts[key] is not None}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def to_share(run: Path | str, files: Mapping[str, str], registry: Registry) -> dict[str, Any]:
    """The content of the manifest of a copy of a RUN. files: file, relative to the RUN -> the hash
    of the copy, of all files; only those that are recorded here are taken. registry: the
    copy's."""
    found = _read(run)
    known = {expert.first_reference: expert for expert in registry.experts}
    experts = {name: digest(known[name], registry) for name in found["experts"] if name in known}
    kept = {name: files.get(name, before) for name, before in found["files"].items()}
    return _content({"files": kept, "experts": experts})


def record_expert(run: Path | str, expert: Expert) -> None:
    """Records the `digest` of a version that is about to be published."""
    with _changed(Path(run)) as (_, experts):
        experts[expert.first_reference] = digest(expert, Registry.load(run))


def forget_removed(run: Path | str) -> None:
    """Drops the hashes of records that the registry does not have any more, or only as stubs of
    experts that were removed."""
    with _changed(Path(run)) as (_, experts):
        # Versions in training are recorded before they are published.
        known = {e.first_reference for e in Registry.load(run).experts if e.removed is None}
        for reference in experts.keys() - known:
            del experts[reference]


def record(run: Path | str, names: Iterable[str], *, again: bool = False) -> None:
    """Records hashes of files and folders of a RUN, named relative to it, as they are now.

    Names that do not exist are ignored. again: the files were just rewritten, so the records of
    those that are gone are dropped. Otherwise recorded hashes stay, so that a command which finds
    its work done does not accept a file that was changed or deleted since."""
    run = Path(run)
    with _changed(run) as (known, _):
        for name in names:
            path = run / name
            inside = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
            present = {file.relative_to(run).as_posix() for file in inside if file.is_file()}
            if again:
                for gone in {n for n in known if n == name or n.startswith(f"{name}/")} - present:
                    del known[gone]
            known.update({n: sha256(run / n) for n in present if again or n not in known})


def write(run: Path | str, name: str, save: Callable[[Path], object]) -> None:
    """Writes a router, a file of a RUN that is named relative to it, so that it has its recorded
    hash whenever it is there: it is recorded before it gets its name. save: writes it to a path."""
    path = Path(run) / name
    new = Path(run) / "train" / name.replace("/", "+")  # a folder that has nothing recorded
    remove_unfinished(new)
    save(new)

    def move() -> None:
        path.parent.mkdir(exist_ok=True)
        new.replace(path)

    with _changed(Path(run), move) as (known, _):
        known[name] = sha256(new)


@contextmanager
def _changed(
    run: Path, then: Callable[[], object] = lambda: None
) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Context in which no other process writes the manifest, with its hashes of files and of
    experts; these are written at the end, before `then` is called."""
    with locked(run, "hashes", wait_seconds=30.0):
        remove_unfinished(run / FILE_NAME)
        found = _read(run)
        before = deepcopy(found)
        for file in [n for n in found["files"] if is_given_up(run, n)]:
            del found["files"][file]
        yield found["files"], found["experts"]
        if found != before:
            write_json(run / FILE_NAME, _content(found))
        then()


def _content(found: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    hashes = {key: dict(sorted(part.items())) for key, part in found.items() if part}
    return {"format": FORMAT, "files": {}} | hashes


def is_given_up(run: Path | str, name: str) -> bool:
    """Whether a recorded file was deleted in a way that is no fault: a router, which is fitted
    again, or the whole folder of a merged model or of another of `COMBINED`."""
    folder, *inside = name.split("/")
    if folder == "routers":
        return not (Path(run) / name).exists()
    return folder in COMBINED and not (Path(run) / folder / inside[0]).exists()


def _read(run: Path | str) -> dict[str, dict[str, str]]:
    path = Path(run) / FILE_NAME
    value = read_json(path, newest_format=FORMAT) if path.exists() else {"files": {}}
    found = {"experts": {}} | {key: value[key] for key in ("files", "experts") if key in value}
    check_types(str(path), found, {"files": dict, "experts": dict})
    for hashes in (found["files"], found["experts"]):
        check_types(str(path), hashes, dict.fromkeys(hashes, str))
        if faults := list(hash_faults(hashes)):
            raise UserError(f"{path}: {'; '.join(faults[:5])}")
    return found


def is_recorded(run: Path | str, name: str) -> bool:
    """Whether a file of a RUN, named relative to it, has a recorded hash, and has it still."""
    return recorded(run).get(name) == sha256(Path(run) / name)
