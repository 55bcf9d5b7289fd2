"""Locks, so that no two commands write the same part of a RUN at once.

The locks are the operating system's: they are released when their process ends, in whatever way.
They work across machines if the file system supports flock (NFS does, most object-store mounts do
not).
"""

import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from clustering.errors import UserError
from experts.expert import stays_inside
from experts.registry import Registry

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
    run: Path | str, change: Callable[[Registry], Registry], *, wait_seconds: float = 30.0
) -> Registry:
    """The registry of a RUN after `change`, saved, while no other process can change it.

    If nothing changes, the file is not written. UserError if the lock is not free within
    `wait_seconds`."""
    with locked(run, wait_seconds=wait_seconds):
        before = Registry.load(run)
        after = change(before)
        if after != before:
            after.save(run)
    return after


def _this_process() -> str:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {since} ({command})"
