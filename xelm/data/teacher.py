"""What a teacher predicts at each token of some documents: its likeliest tokens with their log
probabilities, computed once, memory-mapped, and read row by row together with the text.

TEACHER/
  teacher.json              numbers of targets and of predictions, and how many are written
  ids                       little-endian uint16 or uint32 [targets, n]
  log_probabilities         float16 [targets, n], natural logarithms

The targets of a document are its tokens and its end. Documents follow one another in the order of
their numbers, sources in the order of the training.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float, Int, Integer

from clustering.errors import UserError
from clustering.files import read_json, write_json

FORMAT = 1
RECORD = "teacher.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherText:
    """A teacher's predictions along documents of one language."""

    ids: Integer[np.ndarray, "targets n"]
    """The teacher's n likeliest tokens at each target."""
    log_probabilities: Float[np.ndarray, "targets n"]
    """Their log probabilities, in nats."""
    numbers: Int[np.ndarray, " documents"]
    """Numbers of the documents, ascending."""
    ends: Int[np.ndarray, " documents"]
    """Index at which the targets of each document end."""
    share: float
    """Weight of the divergence from the teacher in the loss; the cross-entropy has the rest."""

    def document(self, number: int) -> tuple[Integer[np.ndarray, "t n"], Float[np.ndarray, "t n"]]:
        """Likeliest tokens and log probabilities at each target of one document."""
        place = int(np.searchsorted(self.numbers, number))
        assert self.numbers[place] == number, f"the teacher has not read document {number}"
        part = slice(int(self.ends[place - 1]) if place else 0, int(self.ends[place]))
        return self.ids[part], self.log_probabilities[part]


def bytes_of(targets: int, top: int, vocabulary_size: int) -> int:
    """Bytes on disk of `top` predictions at each of so many targets."""
    return targets * top * (_ids_dtype(vocabulary_size).itemsize + 2)


class TeacherStore:
    """A folder with a teacher's predictions, complete or not."""

    def __init__(self, directory: Path, *, targets: int, top: int, vocabulary_size: int):
        self.directory, self.targets, self.top = directory, targets, top
        self.files = {"ids": _ids_dtype(vocabulary_size), "log_probabilities": np.dtype("<f2")}
        """Name of each file -> dtype of its numbers."""

    @property
    def written(self) -> int:
        """Number of targets, from the first on, whose predictions are on disk."""
        return self._count("written")

    @property
    def tokens_read(self) -> int:
        """Number of tokens that the teacher's models have read for these, all together."""
        return self._count("tokens_read")

    def _count(self, name: str) -> int:
        path = self.directory / RECORD
        return read_json(path, FORMAT)[name] if path.exists() else 0

    @property
    def complete(self) -> bool:
        """Whether the predictions at all targets are on disk."""
        return self.written == self.targets

    @contextmanager
    def writing(self) -> Iterator["TeacherWriter"]:
        """Opens the files to be written after what is there. UserError where they cannot be."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with ExitStack() as opened:
                files = []
                for name in self.files:
                    path = self.directory / name
                    path.touch()
                    files.append(opened.enter_context(path.open("r+b")))
                yield TeacherWriter(self, files)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {self.directory}: {reason}") from error

    def open(
        self, documents: Sequence[tuple[Int[np.ndarray, " d"], Int[np.ndarray, " d"]]], share: float
    ) -> list[TeacherText]:
        """The predictions for each source: numbers of its documents, ascending, and their numbers
        of targets. share: as in `TeacherText`."""
        arrays = []
        for name, dtype in self.files.items():
            path, shape = self.directory / name, (self.targets, self.top)
            if not path.exists() or path.stat().st_size != dtype.itemsize * shape[0] * shape[1]:
                raise _mismatch(path)
            arrays.append(np.memmap(path, dtype, "r", shape=shape))
        found, first = [], 0
        for numbers, counts in documents:
            ends = np.cumsum(counts)
            part = slice(first, first + int(ends[-1]) if len(ends) else first)
            ids, values = (array[part] for array in arrays)
            found.append(
                TeacherText(
                    ids=ids, log_probabilities=values, numbers=numbers, ends=ends, share=share
                )
            )
            first = part.stop
        assert first == self.targets
        return found


class TeacherWriter:
    """Appends predictions to a `TeacherStore`; what `saved` has counted survives a crash."""

    def __init__(self, store: TeacherStore, files: Sequence[BinaryIO]):
        self._store, self._files = store, files
        self.written, self.tokens_read = store.written, store.tokens_read
        for file, (name, dtype) in zip(files, store.files.items()):
            size = self.written * store.top * dtype.itemsize
            if file.seek(0, os.SEEK_END) < size:
                raise _mismatch(store.directory / name)
            # What a process wrote that was killed before it was counted is written again.
            file.seek(size)

    def append(
        self, ids: Integer[np.ndarray, "t n"], log_probabilities: Float[np.ndarray, "t n"]
    ) -> None:
        """Writes the predictions at the next targets. Probabilities below the range of float16,
        e^-65504, stay finite."""
        least = float(np.finfo(np.float16).min)
        arrays = ids, np.maximum(log_probabilities, least)
        for file, dtype, array in zip(self._files, self._store.files.values(), arrays):
            file.write(np.ascontiguousarray(array, dtype).tobytes())
        self.written += len(ids)

    def save(self, tokens_read: int = 0) -> None:
        """Makes sure that all is on disk, and counts it. tokens_read: number of tokens that models
        have read for what is new; the record has the sum."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self.tokens_read += tokens_read
        record = {
            "format": FORMAT,
            "targets": self._store.targets,
            "top": self._store.top,
            "written": self.written,
            "tokens_read": self.tokens_read,
        }
        write_json(self._store.directory / RECORD, record)


def _mismatch(path: Path) -> UserError:
    return UserError(f"{path} does not match {RECORD}; delete {path.parent} and run again")


def _ids_dtype(vocabulary_size: int) -> np.dtype:
    return np.dtype("<u2" if vocabulary_size <= 2**16 else "<u4")
