"""Locks: one command at a time writes one thing in a RUN, and others write other things.

The locks belong to the operating system and vanish with their process, however it ends. They hold
between machines where the file system passes flock on (NFS does, most object-store mounts do not).
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
    """Hold a lock of a RUN: 'registry' to change registry.json, 'train-NAME' to train NAME.

    UserError, which says who holds it since when, if it is not free within `wait_seconds`.
    """
    if not stays_inside(name) or "/" in name:
        raise UserError(f"{name!r} cannot name a lock")
    if not Path(run).is_dir():
        raise UserError(f"there is no RUN at {run}")
    folder = Path(run) / FOLDER
    lock = FileLock(folder / f"{name}.lock")
    holder = folder / f"{name}.txt"
    try:
        folder.mkdir(exist_ok=True)
        lock.acquire(timeout=wait_seconds)
    except Timeout:
        raise UserError(_refusal(run, name, holder)) from None
    except OSError as error:
        raise UserError(f"{run} cannot be locked for writing: {error.strerror}") from error
    try:
        # The lock holds without the note, which is for the next who asks.
        with suppress(OSError):
            holder.write_text(_this_process(), encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def holder(run: Path | str, name: str) -> str | None:
    """Who holds a lock of a RUN now, or None."""
    note = Path(run) / FOLDER / f"{name}.txt"
    try:
        who = note.read_text(encoding="utf-8")
        # Notes of processes that were killed stay behind: the lock itself knows.
        with FileLock(note.with_suffix(".lock"), timeout=0):
            return None
    except Timeout:
        return " ".join(who.split())
    except OSError:
        return None


def update(
    run: Path | str, change: Callable[[Registry], Registry], *, wait_seconds: float = 30.0
) -> Registry:
    """The registry of a RUN after `change`, saved; no other process can change it in between.

    A change that changes nothing leaves the file alone. UserError if the registry is not free
    within `wait_seconds`.
    """
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


def _refusal(run: Path | str, name: str, holder: Path) -> str:
    try:
        who = holder.read_text(encoding="utf-8")
    except OSError:
        who = ""  # it has just taken the lock, or just let go
    who = " ".join(who.split()) or "another process"
    return f"{run} is in use ({name}) by {who}; wait until it ends, or end it, then run this again"
