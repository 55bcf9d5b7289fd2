"""Verifying: whether the files of a RUN that inference reads are those that commands wrote.

Files are compared with their hashes; checkpoints are not run. The tokenised corpus is not checked,
but what is fitted on it is.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from clustering.errors import UserError
from clustering.files import read_object, sha256
from experts import manifest
from experts.expert import SEED, Expert, parse_reference
from experts.registry import FILE_NAME, Registry

BASE = "base.json"
"""File that names the base of a directory that is no complete checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One difference between a RUN's files and their recorded hashes."""

    kind: Literal["missing", "changed", "unknown", "link", "broken"]
    """Kind of fault: 'unknown' is a file without a recorded hash; 'link' leads out of the RUN;
    'broken' cannot be checked."""
    file: str
    """Path relative to the RUN."""
    detail: str
    """Explanation: what was expected and what was found."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.file}: {self.detail}"


def verify(run: Path | str) -> list[Fault]:
    """Every fault in the files of a RUN that inference reads; empty if all is well.

    The registry has the hashes of seed and experts, and `manifest` those of its records and of the
    other files. Published versions are checked completely, and retired ones too if their directory
    is still there, since they can be rolled back to. Versions in training have no hashes yet.
    UserError if there is no registry."""
    run = Path(run)
    if not (run / FILE_NAME).is_file():
        raise UserError(f"{run} is no RUN: it has no {FILE_NAME}")
    try:
        registry = Registry.load(run)
    except UserError as error:
        return [Fault(kind="broken", file=FILE_NAME, detail=str(error))]
    faults = verify_seed(run, registry)
    for expert in registry.experts:
        faults += verify_expert(run, expert) + verify_base(run, registry, expert)
    faults += _records(run, registry) + _unknown(run, registry)
    return faults + _others(run) + _links(run, registry)


def _records(run: Path, registry: Registry) -> list[Fault]:
    """Faults of versions whose record in the registry, such as their languages, changed since they
    were published."""
    try:
        wanted = manifest.recorded_experts(run)
    except UserError:
        return []  # `_others` reports it
    return [
        Fault(
            kind="changed",
            file=FILE_NAME,
            detail=f"the record of {expert.reference} changed after it was published",
        )
        for expert in registry.experts
        if expert.sha256
        and expert.removed is None
        and wanted.get(expert.first_reference) != manifest.digest(expert, registry)
    ]


def _unknown(run: Path, registry: Registry) -> list[Fault]:
    """Faults of files and folders in experts/ that belong to no version in the registry."""
    known = {Path(expert.path) for expert in registry.experts}
    others = [Path(e.path) for e in registry.experts if e.status != "published"]
    # A version is written into such a folder before it is renamed, and deleted in one.
    known |= {path.with_name(f".{path.name}.partial") for path in others}
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
    """Faults of the files in the manifest, and of files beside them that are not recorded."""
    try:
        wanted = manifest.recorded(run)
        inside = [
            f"{folder}/{file}" for folder in manifest.FOLDERS for file in _files(run / folder)
        ]
    except UserError as error:
        return [Fault(kind="broken", file=manifest.FILE_NAME, detail=str(error))]
    present = [file for file in [*manifest.FILES, *inside] if (run / file).exists()]
    kept = [file for file in wanted if not manifest.is_given_up(run, file)]
    return _faults(run, {file: wanted.get(file) for file in {*kept, *present}})


def _links(run: Path, registry: Registry) -> list[Fault]:
    """Faults of links that lead out of the RUN: their targets may change or vanish without it."""
    root, found = run.resolve(), []
    covered = [registry.seed_path, "experts", *manifest.FOLDERS, *manifest.FILES, FILE_NAME]
    for name in dict.fromkeys(covered):
        top = run / name
        inside = [Path(folder) / n for folder, *names in os.walk(top) for n in chain(*names)]
        found += [path for path in (top, *inside) if path.is_symlink()]
    return [
        Fault(kind="link", file=path.relative_to(run).as_posix(), detail=f"it leads to {target}")
        for path in found
        if not (target := path.resolve()).is_relative_to(root)
    ]


def verify_expert(
    run: Path | str, expert: Expert, digest: Callable[[Path], str] | None = None
) -> list[Fault]:
    """Every fault in the files of one expert version; none for one without hashes. digest: returns
    a file's SHA-256, perhaps from a cache; None reads the file."""
    gone = not expert.directory(run).exists()
    if not expert.sha256 or (expert.status == "retired" and gone):
        return []
    return _compare(Path(run), expert.path, expert.sha256, digest)


def verify_base(run: Path | str, registry: Registry, expert: Expert) -> list[Fault]:
    """The fault of an expert that was made on another base than its parent's checkpoint; none for
    one that is complete, or whose files are gone."""
    path = expert.directory(run) / BASE
    if not expert.stored or not expert.sha256 or not path.is_file():
        return []
    wanted, place = registry.seed_sha256, registry.seed_path
    if expert.parent != SEED:
        parent = registry.expert(*parse_reference(expert.parent))
        wanted, place = parent.sha256, parent.path
    try:
        made_on = read_object(path)
        base = Path(os.path.normpath(path.parent / made_on["base"]))
        other = {n: h for n, h in dict(made_on["sha256"]).items() if wanted.get(n) != h}
        if base.absolute() == (Path(run) / place).absolute() and not other:
            return []
        detail = f"{', '.join(sorted(other)) or base} is another than that of {expert.parent}"
    except (UserError, KeyError, TypeError, ValueError) as error:
        detail = f"it names no base: {error}"
    detail = f"{expert.reference} was made on another base ({expert.stored}): {detail}"
    return [Fault(kind="changed", file=f"{expert.path}/{BASE}", detail=detail)]


def verify_seed(
    run: Path | str, registry: Registry, digest: Callable[[Path], str] | None = None
) -> list[Fault]:
    """Every fault in the files of a RUN's seed; `digest` as in `verify_expert`."""
    return _compare(Path(run), registry.seed_path, registry.seed_sha256, digest)


def verify_recorded(
    run: Path | str, folder: str, digest: Callable[[Path], str] | None = None
) -> list[Fault]:
    """Every fault in a folder's files in the manifest; `digest` as in `verify_expert`."""
    wanted = {n: h for n, h in manifest.recorded(run).items() if n.startswith(f"{folder}/")}
    return _faults(Path(run), wanted, digest)


def hash_directory(path: Path | str) -> dict[str, str]:
    """File, relative to `path` ('a/b') -> hexadecimal SHA-256; sorted.

    A link to a file counts as the file. UserError if the directory or a part of it cannot be read,
    and for a link to a directory, whose files would have no hashes."""
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"there is no directory {root}")
    return {file: sha256(root / file) for file in _files(root)}


def _files(root: Path) -> list[str]:
    """Paths of all files in `root`, relative to it; none if it does not exist."""
    found = []
    for folder, folders, files in os.walk(root, onerror=_refuse_unreadable):
        for name in folders:
            if (Path(folder) / name).is_symlink():
                link = Path(folder) / name
                raise UserError(f"{link} is a link to a directory; put the files there")
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files]
    return sorted(found)


def _refuse_unreadable(error: OSError) -> None:
    # Without this os.walk skips a directory that it cannot list.
    if not isinstance(error, FileNotFoundError):
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error


def _compare(
    run: Path, directory: str, wanted: dict[str, str], digest: Callable[[Path], str] | None
) -> list[Fault]:
    try:
        hashes = dict.fromkeys(_files(run / directory)) | wanted
    except UserError as error:
        return [Fault(kind="broken", file=directory, detail=str(error))]
    return _faults(run, {f"{directory}/{file}": hash for file, hash in hashes.items()}, digest)


def _faults(
    run: Path, wanted: Mapping[str, str | None], digest: Callable[[Path], str] | None = None
) -> list[Fault]:
    """Faults of files of a RUN, relative to it -> the SHA-256 that they should have; None is a file
    without a record."""
    found = (_fault(run, name, wanted[name], digest or sha256) for name in sorted(wanted))
    return [fault for fault in found if fault is not None]


def _fault(run: Path, name: str, wanted: str | None, digest: Callable[[Path], str]) -> Fault | None:
    if wanted is None:
        return Fault(kind="unknown", file=name, detail="no hash of it is recorded")
    if not (run / name).is_file():
        return Fault(kind="missing", file=name, detail=f"wanted sha256 {wanted}")
    try:
        came = digest(run / name)
    except UserError as error:
        return Fault(kind="broken", file=name, detail=str(error))
    if came != wanted:
        return Fault(kind="changed", file=name, detail=f"wanted sha256 {wanted}; got {came}")
    return None
