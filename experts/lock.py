"""Locks, so that no two commands write the same part of a RUN at once.

The locks are the operating system's: they are released when their process ends, in whatever way.
They work across machines if the file system supports flock (NFS does, most object-store mounts do
not).
"""

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from clustering.errors import UserError
from clustering.files import remove_unfinished
from experts.expert import stays_inside
from experts.history import command_line, event_of_now
from experts.registry import FILE_NAME, Registry

FOLDER = ".locks"


@contextmanager
def locked(run: Path | str, name: str = "registry", *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Context in which a lock of a RUN is acquired: 'registry' to change registry.json,
    'train-NAME' to train NAME.

    UserError if it is not free within `wait_seconds`; it names the process that has the lock."""
    if not stays_inside(name) or "/" in name:
        raise UserError(f"{name!r} cannot name a lock")
    if not Path(run).is_dir():
        raise UserError(f"there is no RUN at {run}")
    folder = Path(run) / FOLDER
    lock = FileLock(folder / f"{name}.lock")
    note = folder / f"{name}.txt"
    try:
        folder.mkdir(exist_ok=True)
        lock.acquire(timeout=wait_seconds)
    except Timeout:
        process = "another process"
        with suppress(OSError):  # it acquires or releases the lock at this moment
            process = " ".join(note.read_text(encoding="utf-8").split()) or process
        raise UserError(
            f"{run} is in use ({name}) by {process}; wait until it ends, or end it, then run this "
            "again"
        ) from None
    except OSError as error:
        raise UserError(f"{run} cannot be locked for writing: {error.strerror}") from error
    try:
        # The lock works without this note, which names its owner in error messages.
        with suppress(OSError):
            note.write_text(_this_process(), encoding="utf-8")
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def owner(run: Path | str, name: str) -> str | None:
    """Description of the process that has a lock of a RUN now, or None."""
    note = Path(run) / FOLDER / f"{name}.txt"
    try:
        process = note.read_text(encoding="utf-8")
        # The note of a process that was killed stays behind, so try the lock itself.
        with FileLock(note.with_suffix(".lock"), timeout=0):
            return None
    except Timeout:
        return " ".join(process.split())
    except OSError:
        return None


def update(
    run: Path | str,
    change: Callable[[Registry], Registry],
    action: str,
    facts: Mapping[str, Any] | None = None,
    *,
    wait_seconds: float = 30.0,
) -> Registry:
    """The registry of a RUN after `change`, saved with an event in its history, while no other
    process can change it.

    action, facts: as in `history.Event`. If nothing changes, the file is not written. UserError if
    the lock is not free within `wait_seconds`."""
    with locked(run, wait_seconds=wait_seconds):
        remove_unfinished(Path(run) / FILE_NAME)
        before = Registry.load(run)
        after = change(before)
        if after != before:
            event = event_of_now(action, _changes(before, after), facts)
            after = replace(after, history=(*after.history, event))
            after.save(run)
    return after


def record(
    run: Path | str,
    action: str,
    references: Iterable[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Records what happens to a RUN or to expert versions, and changes no status, in its history.
    facts: as in `history.Event`."""
    with locked(run, wait_seconds=30.0):
        registry = Registry.load(run)
        statuses = {expert.reference: expert.state for expert in registry.experts}
        known = {name: statuses[name] for name in references if name in statuses}
        event = event_of_now(action, known, facts)
        replace(registry, history=(*registry.history, event)).save(run)


def _changes(before: Registry, after: Registry) -> dict[str, str | None]:
    """Reference -> status, of versions that were added or have another status; None for those that
    were removed."""
    old, new = (
        {e.reference: None if e.removed else e.state for e in registry.experts}
        for registry in (before, after)
    )
    changed = {name: status for name, status in new.items() if old.get(name) != status}
    return changed | {name: None for name in old if name not in new}


def _this_process() -> str:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {since} ({command_line()})"
