"""Files of JSON and arrays (`.npz`): atomic writing, checked reading, format numbers and hashes.

Nothing is ever pickled: loading somebody's file must not run their code.
"""

import errno
import glob
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np

from clustering.errors import UserError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a file is in the place of a folder",
    errno.EEXIST: "a file is in the place of a folder",
    errno.EISDIR: "a folder is in the place of the file",
}
"""Causes of a failure to write that a user can remove; any other is raised as it is."""


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON, atomically; ValueError for NaN and infinity."""
    text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    replace(Path(path), lambda file: file.write(text.encode()))


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays as one uncompressed `.npz`, atomically; equal arrays give equal bytes.

    Raises ValueError for an array of Python objects, which could only be pickled."""
    objects = [name for name, array in arrays.items() if np.asarray(array).dtype.hasobject]
    if objects:
        raise ValueError(
            f"arrays must be of numbers or strings; got Python objects in {', '.join(objects[:5])}"
        )
    named: dict[str, Any] = dict(arrays)
    replace(Path(path), lambda file: np.savez(file, allow_pickle=False, **named))


def read_json(path: str | os.PathLike[str], newest_format: int = 1) -> dict[str, Any]:
    """The JSON object of a file with a `format` number.

    Raises UserError if the file is missing or damaged, or if its number is above `newest_format`,
    the highest that the caller reads."""
    value = read_object(path)
    number = value.get("format")
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise UserError(
            f'{path} must be a JSON object with a "format" number of 1 or more; got {number!r}'
        )
    if number > newest_format:
        raise UserError(
            f"{path} is of format {number}, this xelm reads up to {newest_format}; upgrade xelm"
        )
    return value


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object of a file; UserError if it is missing, damaged or something else."""
    with _reading(path, "JSON"):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise UserError(f"{path} must be a JSON object; got {value!r:.40}")
    return value


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, without a byte order mark; UserError if it is missing or not
    UTF-8."""
    with _reading(path, "UTF-8"):
        return Path(path).read_text(encoding="utf-8-sig")


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of an `.npz`; UserError if it is missing, damaged, or has pickled objects."""
    # Opened here, since NumPy does not close a file that is no archive.
    with (
        _reading(path, "an .npz of plain arrays"),
        open(path, "rb") as file,
        np.load(file, allow_pickle=False) as archive,
    ):
        return {name: archive[name] for name in archive.files}


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file in hexadecimal, read piece by piece."""
    with _reading(path, "a file"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _reading(path: str | os.PathLike[str], form: str) -> Iterator[None]:
    """Context that raises UserError where a file cannot be read, or is not of a form."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    # TypeError is NumPy's for an .npy, RuntimeError that of archives with other features; bytes
    # that are not UTF-8 are a ValueError.
    except (ValueError, EOFError, TypeError, RuntimeError, BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is not {form}: {error}") from error


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces a file by what `write` writes into a binary file: complete and on disk, or not at
    all. UserError if the system does not let it be written, as on a full disk."""
    # In the same folder, since os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        # Errors of writing to an open file do not name it.
        reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
        raise UserError(f"{path} was not written: {reason}; nothing was changed") from error
    _sync(path.parent)  # so that the new name, too, survives a power cut


def remove_unfinished(path: Path) -> None:
    """Deletes what a killed process left when it was about to replace a file. The caller has the
    lock under which the file is written."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        temporary.unlink(missing_ok=True)


def flush(folder: Path) -> None:
    """Syncs a folder and everything in it to disk, as is due before it gets its final name."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, nor a file that is only read
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
