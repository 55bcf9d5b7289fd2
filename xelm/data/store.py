"""A corpus, tokenised once: memory-mapped ids by language, and a record of what was read.

STORE/
  store.json              format, corpus, fingerprints, counts by language, unusable records
  <language>.ids          subword ids of all documents in order, little-endian uint16 or uint32
  <language>.ends.npy     int64 [documents]: where each document ends
  <language>.bytes.npy    int64 [documents]: UTF-8 bytes of each document's text
"""

import array
import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from clustering.errors import UserError
from clustering.files import flush, read_json, write_json
from xelm.data.corpus import Document, Faults, no_documents
from xelm.data.tokenizer import Tokenizer

# Documents tokenised at once: enough for the tokenizer's threads, little enough for memory.
BATCH_DOCUMENTS = 512
# Documents read in one piece where parts of a corpus go to many machines.
PART_DOCUMENTS = 50_000


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageIds:
    """The documents of one language as subword ids, memory-mapped."""

    language: str
    """As in the corpus."""
    ids: Integer[np.ndarray, " tokens"]
    """All documents one after the other, without special tokens."""
    ends: Int[np.ndarray, " documents"]
    """Where each document ends in `ids`."""
    bytes: Int[np.ndarray, " documents"]
    """UTF-8 bytes of each document's text."""

    def __len__(self) -> int:
        return len(self.ends)

    def document(self, number: int) -> Integer[np.ndarray, " tokens"]:
        """The ids of one document."""
        start = self.ends[number - 1] if number else 0
        return self.ids[start : self.ends[number]]

    @property
    def lengths(self) -> Int[np.ndarray, " documents"]:
        """Tokens of each document, special tokens not counted."""
        return np.diff(self.ends, prepend=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """A tokenised corpus."""

    directory: Path
    """Where it lies."""
    languages: Mapping[str, LanguageIds]
    """Documents by language, in the order they were asked for."""
    record: Mapping[str, Any]
    """store.json: counts and unusable records."""

    def parts(self, languages: Iterable[str]) -> list["StorePart"]:
        """All documents in these languages, in order."""
        directory = self.directory.absolute()
        return [
            StorePart(
                directory, tag, range(len(self.languages[tag]))[first : first + PART_DOCUMENTS]
            )
            for tag in languages
            for first in range(0, len(self.languages[tag]), PART_DOCUMENTS)
        ]


@dataclass(frozen=True, slots=True)
class StorePart:
    """Some documents of one language, told by where they lie: to be read on any machine."""

    directory: Path
    """Of the store, absolute."""
    language: str
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[tuple[Integer[np.ndarray, " tokens"], str]]:
        """Ids of each document, and the language."""
        record = read_json(self.directory / "store.json")
        ids = _open_language(self.directory, self.language, record)
        for number in self.numbers:
            yield ids.document(number), self.language


def open_store(directory: str | Path) -> Store:
    """Opens a tokenised corpus without reading it."""
    directory = Path(directory)
    record = read_json(directory / "store.json")
    languages = {tag: _open_language(directory, tag, record) for tag in record["languages"]}
    return Store(directory=directory, languages=languages, record=record)


def _open_language(directory: Path, language: str, record: Mapping[str, Any]) -> LanguageIds:
    dtype, counts = np.dtype(record["dtype"]), record["languages"][language]
    path = directory / f"{language}.ids"
    if path.stat().st_size != counts["tokens"] * dtype.itemsize:
        raise _mismatch(path)
    return LanguageIds(
        language=language,
        # An empty file cannot be mapped.
        ids=np.memmap(path, dtype, "r") if counts["tokens"] else np.empty(0, dtype),
        ends=_numbers(directory / f"{language}.ends.npy", counts["documents"]),
        bytes=_numbers(directory / f"{language}.bytes.npy", counts["documents"]),
    )


def _numbers(path: Path, count: int) -> Int[np.ndarray, " documents"]:
    try:
        numbers = np.load(path, mmap_mode="r")
    except (ValueError, EOFError):  # of a file that was cut short
        raise _mismatch(path) from None
    if numbers.shape != (count,):
        raise _mismatch(path)
    return numbers


def _mismatch(path: Path) -> UserError:
    return UserError(f"{path} does not match store.json; delete {path.parent} and run again")


def build_store(
    directory: str | Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    faults: Faults,
    *,
    languages: Iterable[str] | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int], object] = lambda documents: None,
) -> Store:
    """Tokenises `documents` into `directory`, which appears whole or not at all.

    languages: those to keep, each of which must turn up; None keeps all. Documents of other
    languages are counted as left out. facts: entries for store.json. progress: is told how many
    documents each batch held.
    """
    target = Path(directory)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = np.dtype("<u2" if tokenizer.size <= 2**16 else "<u4")
    wanted = None if languages is None else list(languages)
    try:
        with contextlib.ExitStack() as stack:
            writers: dict[str, _Writer] = {}
            for batch in _batches(kept(documents, wanted, faults)):
                for document, ids in zip(batch, tokenizer.encode([d.text for d in batch])):
                    language = document.language
                    if language not in writers:
                        file = stack.enter_context((partial / f"{language}.ids").open("wb"))
                        writers[language] = _Writer(file, dtype)
                    writers[language].add(ids, len(document.text.encode()))
                progress(len(batch))
        order = sorted(writers) if wanted is None else wanted
        missing = [language for language in order if language not in writers]
        if missing or not order:
            raise no_documents(missing, faults)
        counts = {language: writers[language].finish(partial, language) for language in order}
        write_json(
            partial / "store.json",
            {
                "format": 1,
                **(facts or {}),
                "dtype": dtype.str,
                "languages": counts,
                "left_out": faults.to_json(),
            },
        )
        flush(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; nothing was changed") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_store(target)


class _Writer:
    """Appends the documents of one language."""

    def __init__(self, file: Any, dtype: np.dtype):
        self.file, self.dtype = file, dtype
        # Eight bytes a document: there may be many millions.
        self.lengths, self.bytes = array.array("q"), array.array("q")

    def add(self, ids: list[int], size: int) -> None:
        self.file.write(np.asarray(ids, self.dtype).tobytes())
        self.lengths.append(len(ids))
        self.bytes.append(size)

    def finish(self, directory: Path, language: str) -> dict[str, int]:
        np.save(directory / f"{language}.ends.npy", np.cumsum(self.lengths, dtype=np.int64))
        np.save(directory / f"{language}.bytes.npy", np.asarray(self.bytes, np.int64))
        return {
            "documents": len(self.lengths),
            "tokens": sum(self.lengths),
            "bytes": sum(self.bytes),
        }


def kept(
    documents: Iterable[Document], wanted: Sequence[str] | None, faults: Faults
) -> Iterator[Document]:
    """The documents in the `wanted` languages, or all if None; others are counted in `faults`."""
    try:
        for number, document in enumerate(documents, 1):
            if wanted is None or document.language in wanted:
                yield document
            else:
                reason = f"language {document.language}, which was not asked for"
                faults.add(reason, f"record {number}")
    except OSError as error:
        # Of reading, which the caller must not take for one of writing.
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{error.strerror or error}") from error


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch = []
    for document in documents:
        batch.append(document)
        if len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch
