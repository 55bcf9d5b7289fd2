"""A corpus, tokenised once: memory-mapped ids by language, and a record of what was read.

STORE/
  store.json              format, corpus, fingerprints, counts by language, unusable records
  <language>.ids          subword ids of all documents in order, little-endian uint16 or uint32
  <language>.ends.npy     int64 [documents]: where each document ends
  <language>.bytes.npy    int64 [documents]: UTF-8 bytes of each document's text
  <language>.order.npy    int64 [documents]: their numbers, shuffled
  <language>.stream.npy   int64 [documents]: where each ends in a stream of that order
  <language>.hashes       uint64 [documents, 2], little-endian: hash of each document's text
  <language>.signatures   uint32 [documents, 64], little-endian: MinHash of each document's shingles

The order is drawn once, when the store is made: for a hundred million documents that takes a
quarter of a minute, too long for every start of a training.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer, UInt64

from clustering.errors import UserError
from clustering.files import read_json
from clustering.languages import find
from xelm.data.duplicates import HASH_WORDS, SIGNATURE_SIZE, Fingerprints, fingerprint_method

FORMAT = 2
FRAME = 2
"""Number of special tokens of each document in a stream: start (not in all RUNs) and end."""
_MAPPED = 2**16
"""Size in bytes above which a file is mapped, which keeps it open: a store of hundreds of languages
has more files than a process may have open."""
# Number of documents in a part of a store; parts are read on several machines.
PART_DOCUMENTS = 50_000


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedLanguage:
    """The documents of one language as subword ids, memory-mapped."""

    language: str
    """Tag of the language in the corpus."""
    ids: Integer[np.ndarray, " tokens"]
    """Ids of all documents, one after the other, without special tokens."""
    ends: Int[np.ndarray, " documents"]
    """Index in `ids` at which each document ends."""
    bytes: Int[np.ndarray, " documents"]
    """UTF-8 bytes of each document's text."""
    hashes: UInt64[np.ndarray, "documents 2"]
    """Hash of each document's text."""
    order: Int[np.ndarray, " documents"]
    """Numbers of all documents, shuffled."""
    stream_ends: Int[np.ndarray, " documents"]
    """Index at which each document, in that order, ends in a stream with `FRAME` tokens each."""
    directory: Path = Path()
    """Directory of the store."""

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


def shuffled(
    language: str, lengths: Int[np.ndarray, " documents"]
) -> tuple[Int[np.ndarray, " documents"], Int[np.ndarray, " documents"]]:
    """A random order of documents of these lengths, the same for all corpora with so many documents
    in this language; and where they end in the stream in that order."""
    order = np.random.default_rng([*language.encode()]).permutation(len(lengths))
    return order, np.cumsum(lengths[order] + FRAME)


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """A tokenised corpus."""

    directory: Path
    """Directory of the store."""
    languages: Mapping[str, TokenizedLanguage]
    """Documents by language, in the order in which the languages were requested."""
    record: Mapping[str, Any]
    """Content of store.json: counts and unusable records."""

    def fingerprints(self) -> dict[str, Fingerprints] | None:
        """Fingerprints of the documents by language, memory-mapped; None if another version of
        `fingerprint_method` made them."""
        if self.record.get("fingerprints") != fingerprint_method():
            return None
        return {
            tag: Fingerprints(
                ids.hashes,
                _mapped(self.directory / f"{tag}.signatures", "<u4", len(ids), SIGNATURE_SIZE),
            )
            for tag, ids in self.languages.items()
        }

    def tags(self, languages: Iterable[str] | None = None) -> list[str]:
        """Tags in this store of languages that are given by any of their codes; None takes all.
        UserError for languages without text."""
        if languages is None:
            return list(self.languages)
        found = {language: find(language, self.languages) for language in languages}
        missing = [language for language, tag in found.items() if tag is None]
        if missing:
            raise UserError(f"{self.directory} has no text in {', '.join(missing)}")
        return [tag for tag in found.values() if tag is not None]

    def parts(self, languages: Iterable[str]) -> list["StorePart"]:
        """Parts with all documents in these languages, in order."""
        directory = self.directory.absolute()
        return [
            StorePart(directory, tag, numbers[first : first + PART_DOCUMENTS])
            for tag in languages
            for numbers in [range(len(self.languages[tag]))]
            for first in numbers[::PART_DOCUMENTS]
        ]


@dataclass(frozen=True, slots=True)
class StorePart:
    """Some documents of one language, which can be read on any machine that finds the store."""

    directory: Path
    """Absolute path of the store."""
    language: str
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[tuple[Integer[np.ndarray, " tokens"], str]]:
        """Ids and language of each document."""
        record = read_json(self.directory / "store.json", FORMAT)
        ids = _open_language(self.directory, self.language, record)
        for number in self.numbers:
            yield ids.document(number), self.language


def open_store(directory: str | Path) -> Store:
    """Opens a tokenised corpus without reading it."""
    directory = Path(directory)
    record = read_json(directory / "store.json", FORMAT)
    languages = {tag: _open_language(directory, tag, record) for tag in record["languages"]}
    return Store(directory=directory, languages=languages, record=record)


def _open_language(directory: Path, language: str, record: Mapping[str, Any]) -> TokenizedLanguage:
    counts = record["languages"][language]

    def numbers(name: str) -> Int[np.ndarray, " documents"]:
        path = directory / f"{language}.{name}.npy"
        try:
            found = np.load(path, mmap_mode="r" if path.stat().st_size > _MAPPED else None)
        except (ValueError, EOFError, FileNotFoundError):  # a file that is shorter than it says
            raise _mismatch(path) from None
        if found.shape != (counts["documents"],):
            raise _mismatch(path)
        return found

    return TokenizedLanguage(
        language=language,
        ids=_mapped(directory / f"{language}.ids", record["dtype"], counts["tokens"]),
        ends=numbers("ends"),
        bytes=numbers("bytes"),
        hashes=_mapped(directory / f"{language}.hashes", "<u8", counts["documents"], HASH_WORDS),
        order=numbers("order"),
        stream_ends=numbers("stream"),
        directory=directory,
    )


def _mapped(path: Path, dtype: str, *shape: int) -> np.ndarray:
    size = np.dtype(dtype).itemsize * math.prod(shape)
    if not path.exists() or path.stat().st_size != size:
        raise _mismatch(path)
    if size <= _MAPPED:
        return np.fromfile(path, dtype).reshape(shape)
    return np.memmap(path, dtype, "r", shape=shape)


def _mismatch(path: Path) -> UserError:
    return UserError(f"{path} does not match store.json; delete {path.parent} and run again")
