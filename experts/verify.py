"""Verifying: whether the files of a RUN that inference reads are those that commands wrote.

Knows files and hashes. Whether a checkpoint computes anything sensible, it cannot say. The
tokenised corpus is not among them: what is fitted on it is.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clustering.errors import UserError
from clustering.files import sha256
from experts import manifest
from experts.expert import Expert
from experts.registry import FILE_NAME, Registry

# The card of experts of earlier versions; now it is README.md, which is hashed as all else.
UNHASHED = ("CARD.md",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing in a RUN that is not as its registry says."""

    kind: Literal["missing", "changed", "unknown", "link", "broken"]
    """'unknown' is a file of which no hash is recorded; 'link' leads out of the RUN; 'broken' is
    what cannot be checked."""
    file: str
    """Relative to the RUN."""
    detail: str
    """What was wanted and what came."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.file}: {self.detail}"


def verify(run: Path | str) -> list[Fault]:
    """Every fault in the files of a RUN that inference reads; empty if all is well: seed and
    experts by the registry, its records of them and the others by `manifest`, and whatever lies
    beside them.

    Published versions are read whole; retired ones too where their directory is still there, since
    they can be rolled back to. Versions in training have no hashes yet. UserError if there is no
    registry.
    """
    run = Path(run)
    if not (run / FILE_NAME).is_file():
        raise UserError(f"{run} is no RUN: it has no {FILE_NAME}")
    try:
        registry = Registry.load(run)
    except UserError as error:
        return [Fault(kind="broken", file=FILE_NAME, detail=str(error))]
    faults = verify_seed(run, registry)
    for expert in registry.experts:
        faults += verify_expert(run, expert)
    faults += _records(run, registry)
    return faults + _strangers(run, registry) + _others(run) + _links(run, registry)


def _records(run: Path, registry: Registry) -> list[Fault]:
    """Published versions of which the registry says something else than when they were published,
    such as whom they serve; nothing of versions of which no digest was kept."""
    try:
        wanted = manifest.recorded_experts(run)
    except UserError:
        return []  # `_others` tells it
    return [
        Fault(
            kind="changed",
            file=FILE_NAME,
            detail=f"the record of {expert.reference} is not that under which it was published",
        )
        for expert in registry.experts
        if expert.sha256 and wanted.get(expert.reference) not in (None, manifest.digest(expert))
    ]


def _strangers(run: Path, registry: Registry) -> list[Fault]:
    """Folders among the experts that are none of the registry's."""
    known = {Path(expert.path) for expert in registry.experts}
    unfinished = [Path(e.path) for e in registry.experts if e.status == "training"]
    # What a version is written into before it gets its name.
    known |= {path.with_name(f".{path.name}.partial") for path in unfinished}
    parents = {parent for path in known for parent in path.parents}
    found, folders = [], [Path("experts")] if (run / "experts").is_dir() else []
    while folders:
        folder = folders.pop()
        for path in (folder / inner.name for inner in (run / folder).iterdir()):
            if path in parents and (run / path).is_dir():
                folders.append(path)
            elif path not in known:
                found.append(path.as_posix())
    detail = "the registry names no such expert"
    return [Fault(kind="unknown", file=file, detail=detail) for file in sorted(found)]


def _others(run: Path) -> list[Fault]:
    """What the manifest speaks of, and what lies there without being recorded."""
    try:
        wanted = manifest.recorded(run)
        inside = [
            f"{folder}/{file}" for folder in manifest.FOLDERS for file in _files(run / folder)
        ]
    except UserError as error:
        return [Fault(kind="broken", file=manifest.FILE_NAME, detail=str(error))]
    present = [file for file in [*manifest.FILES, *inside] if (run / file).exists()]
    # A router that was deleted is fitted again.
    kept = [file for file in wanted if not file.startswith("routers/")]
    names = sorted({*kept, *present})
    faults = (_fault(run / name, name, wanted.get(name)) for name in names)
    return [fault for fault in faults if fault is not None]


def _links(run: Path, registry: Registry) -> list[Fault]:
    """Links that lead out of the RUN: what lies behind them may change, or go, without it."""
    root, found = run.resolve(), []
    covered = [registry.seed_path, "experts", *manifest.FOLDERS, *manifest.FILES, FILE_NAME]
    for name in dict.fromkeys(covered):
        top = run / name
        paths = [top]
        for folder, folders, files in os.walk(top):
            paths += [Path(folder) / inner for inner in (*folders, *files)]
        found += [path for path in paths if path.is_symlink()]
    return [
        Fault(kind="link", file=path.relative_to(run).as_posix(), detail=f"it leads to {target}")
        for path in found
        if not (target := path.resolve()).is_relative_to(root)
    ]


def verify_expert(
    run: Path | str, expert: Expert, digest: Callable[[Path], str] | None = None
) -> list[Fault]:
    """Every fault in the files of one expert version; none for one that has no hashes. digest:
    gives a file's SHA-256, perhaps remembered; None reads it."""
    gone = not expert.directory(run).exists()
    if not expert.sha256 or (expert.status == "retired" and gone):
        return []
    return _compare(Path(run), expert.path, expert.sha256, digest)


def verify_seed(
    run: Path | str, registry: Registry, digest: Callable[[Path], str] | None = None
) -> list[Fault]:
    """Every fault in the files of a RUN's seed."""
    return _compare(Path(run), registry.seed_path, registry.seed_sha256, digest)


def verify_recorded(
    run: Path | str, folder: str, digest: Callable[[Path], str] | None = None
) -> list[Fault]:
    """Every fault in the files of a folder that the manifest has the hashes of."""
    wanted = {n: h for n, h in manifest.recorded(run).items() if n.startswith(f"{folder}/")}
    faults = (_fault(Path(run) / name, name, hash, digest) for name, hash in wanted.items())
    return [fault for fault in faults if fault is not None]


def hash_directory(path: Path | str) -> dict[str, str]:
    """File, relative to `path` ('a/b'), to hexadecimal SHA-256; sorted, but not CARD.md.

    A link to a file counts as the file. UserError if the directory or a part of it cannot be read,
    and for a link to a directory, since what lies behind it would escape the hashes.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"there is no directory {root}")
    return {file: sha256(root / file) for file in _files(root) if file not in UNHASHED}


def _files(root: Path) -> list[str]:
    """Paths relative to `root` of every file in it; none if it is not there."""
    found = []
    for folder, folders, files in os.walk(root, onerror=_refuse_unreadable):
        for name in folders:
            if (Path(folder) / name).is_symlink():
                link = Path(folder) / name
                raise UserError(f"{link} is a link to a directory; put the files there")
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files]
    return sorted(found)


def _refuse_unreadable(error: OSError) -> None:
    # Without this os.walk passes over a directory that it cannot list.
    if not isinstance(error, FileNotFoundError):
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error


def _compare(
    run: Path, directory: str, wanted: dict[str, str], digest: Callable[[Path], str] | None
) -> list[Fault]:
    root = run / directory
    try:
        present = [file for file in _files(root) if file not in UNHASHED]
    except UserError as error:
        return [Fault(kind="broken", file=directory, detail=str(error))]
    files = sorted(wanted | dict.fromkeys(present, ""))
    faults = (
        _fault(root / file, f"{directory}/{file}", wanted.get(file), digest) for file in files
    )
    return [fault for fault in faults if fault is not None]


def _fault(
    path: Path, name: str, wanted: str | None, digest: Callable[[Path], str] | None = None
) -> Fault | None:
    """What is wrong with one file that should hash to `wanted`, None being no file at all."""
    if wanted is None:
        return Fault(kind="unknown", file=name, detail="no hash of it is recorded")
    if not path.is_file():
        return Fault(kind="missing", file=name, detail=f"wanted sha256 {wanted}")
    try:
        came = (digest or sha256)(path)
    except UserError as error:
        return Fault(kind="broken", file=name, detail=str(error))
    if came != wanted:
        return Fault(kind="changed", file=name, detail=f"wanted sha256 {wanted}; got {came}")
    return None
