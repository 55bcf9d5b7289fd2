"""Hashes of a RUN's other files that inference reads: configuration, clusters, vectoriser, fitted
routers, and the dense baseline.

The registry has the hashes of the seed and of every expert. Other files are written by several
commands at different times; each records what it wrote here, and `verify` compares. The record of
an expert in the registry is hashed here too when it is published, since it never changes after.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clustering.errors import UserError
from clustering.files import read_json, sha256, write_json
from experts.expert import Expert, check_strings, check_types, hash_faults
from experts.lock import locked

FILE_NAME = "hashes.json"
FORMAT = 1
FILES = ("run.json", "clusters.json", "clusters.npz", "vectoriser.npz", "assignments.npz")
"""Files of the RUN's own folder that are recorded."""
FOLDERS = ("dense", "routers")
"""Folders whose files are recorded; those of routers may be deleted, and are then fitted again."""


def recorded(run: Path | str) -> dict[str, str]:
    """File, relative to the RUN -> hexadecimal SHA-256; empty before anything is recorded.
    UserError if the manifest is damaged."""
    return _read(run)["files"]


def recorded_experts(run: Path | str) -> dict[str, str]:
    """Reference of each published version -> the `digest` of its record; early versions of xelm did
    not write them. UserError if the manifest is damaged."""
    return _read(run)["experts"]


def digest(expert: Expert) -> str:
    """SHA-256 of the part of an expert's record that never changes once it is published: all but
    its status and the version that it replaced."""
    facts = expert.to_json()
    kept = {
        key: value
        for key, value in facts.items()
        if key not in ("status", "replaces", *expert.more) and value is not None
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def record_expert(run: Path | str, expert: Expert) -> None:
    """Records the `digest` of a version that is about to be published."""
    run = Path(run)
    with locked(run, "hashes", wait_seconds=30.0):
        known = _read(run)
        _write(run, known["files"], {**known["experts"], expert.reference: digest(expert)})


def _read(run: Path | str) -> dict[str, dict[str, str]]:
    path = Path(run) / FILE_NAME
    value = read_json(path, newest_format=FORMAT) if path.exists() else {"files": {}}
    check_types(str(path), value, {"files": dict})
    found = {"files": value["files"], "experts": value.get("experts", {})}
    check_types(str(path), found, {"experts": dict})
    for hashes in found.values():
        check_strings(str(path), hashes)
        faults = list(hash_faults(hashes))
        if faults:
            raise UserError(f"{path}: {'; '.join(faults[:5])}")
    return found


def _write(run: Path, files: Mapping[str, str], experts: Mapping[str, str]) -> None:
    value: dict[str, Any] = {"format": FORMAT, "files": dict(sorted(files.items()))}
    if experts:
        value["experts"] = dict(sorted(experts.items()))
    write_json(run / FILE_NAME, value)


def record(run: Path | str, names: Iterable[str], *, again: bool = False) -> None:
    """Records hashes of files and folders of a RUN, named relative to it, as they are now.

    Names that do not exist are ignored, and records of deleted files are dropped. again: the files
    were just rewritten. Otherwise recorded hashes stay, so that a command which finds its work done
    does not accept a file that was changed since.
    """
    run = Path(run)
    with locked(run, "hashes", wait_seconds=30.0):
        known = recorded(run)
        found = {name: digest for name, digest in known.items() if (run / name).exists()}
        for name in names:
            path = run / name
            inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            for file in inside:
                key = file.relative_to(run).as_posix()
                if file.is_file() and (again or key not in known):
                    found[key] = sha256(file)
        if found != known:
            _write(run, found, recorded_experts(run))


def is_recorded(run: Path | str, name: str) -> bool:
    """Whether a file of a RUN, named relative to it, has its recorded hash; yes if there is
    none."""
    wanted = recorded(run).get(name)
    return wanted is None or sha256(Path(run) / name) == wanted
