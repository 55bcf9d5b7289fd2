"""Writes a store document by document, and resumes one that was interrupted.

Until it is finished, a store is a hidden folder beside its place. building.json in this folder says
how many documents are on disk; what the files contain beyond that is cut off on resuming.
"""

import glob
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from clustering.errors import UserError
from clustering.files import flush, read_json, remove_unfinished, write_json
from xelm.data.coverage import CoverageCounts
from xelm.data.duplicates import HASH_WORDS, SIGNATURE_SIZE, contained, copies
from xelm.data.parts import no_documents
from xelm.data.store import FORMAT, shuffled
from xelm.data.unusable import UnusableRecords

# Seconds between records of the progress in building.json.
NOTE_SECONDS = 10.0
_COPIED_BYTES = 2**24
# Bytes of all languages together that are kept in memory before they are appended to files.
_WAITING_BYTES = 2**26
# Files of each language: ids, then what is known of each document. There may be many millions of
# documents, too many to keep in memory.
_KINDS = ("ids", "lengths", "sizes", "counts", "hashes", "signatures")
_ROW_BYTES = (8, 8, 4 * len(CoverageCounts._fields), 8 * HASH_WORDS, 4 * SIGNATURE_SIZE)


@contextmanager
def writing(
    target: Path, made_of: Mapping[str, Any], dtype: np.dtype, *, resumable: bool
) -> Iterator["StoreWriter"]:
    """Writer of a store that appears at `target` when the block ends, complete or not at all.

    made_of: JSON that tells the store from others. If the block is left by an error before
    `StoreWriter.finish`, a resumable store is kept, and continued by the next call with equal
    made_of. UserError if the disk cannot be written; nothing is kept then, for it may be full.
    """
    partial = target.with_name(f".{target.name}.partial")
    keep = False
    try:
        writer = _resumed(partial, made_of, dtype) if resumable else None
        if writer is None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            writer = StoreWriter(partial, made_of, dtype)
        try:
            yield writer
        except OSError:
            raise
        except BaseException:
            keep = resumable and not writer.finished
            raise
        flush(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; nothing was changed") from error
    finally:
        if not keep:
            shutil.rmtree(partial, ignore_errors=True)


class StoreWriter:
    """Files of a store that is being written; one is open at a time, as a process may open few."""

    def __init__(
        self,
        folder: Path,
        made_of: Mapping[str, Any],
        dtype: np.dtype,
        documents: int = 0,
        sizes: Mapping[str, Sequence[int]] | None = None,
    ):
        """documents: number on disk. sizes: language -> tokens and documents on disk."""
        self.documents, self.finished = documents, False
        self._folder, self._made_of, self._dtype = folder, made_of, dtype
        self._waiting_bytes, self._noted = 0, time.monotonic()
        self._languages = {
            tag: _LanguageWriter(folder, tag, dtype, *counts)
            for tag, counts in (sizes or {}).items()
        }

    def add(self, language: str, *parts: Any) -> None:
        """Appends a document; parts as in `_LanguageWriter.add`."""
        if language not in self._languages:
            self._languages[language] = _LanguageWriter(self._folder, language, self._dtype, 0, 0)
        self.documents += 1
        self._waiting_bytes += self._languages[language].add(*parts)
        if self._waiting_bytes > _WAITING_BYTES:
            for writer in self._languages.values():
                writer.append()
            self._waiting_bytes = 0

    def note_progress(self) -> None:
        """Puts all documents on disk and records their number, if the last time is long ago."""
        if time.monotonic() <= self._noted + NOTE_SECONDS:
            return
        for writer in self._languages.values():
            writer.append(on_disk=True)
        self._waiting_bytes = 0
        sizes = {tag: (each.tokens, each.documents) for tag, each in self._languages.items()}
        note = {"format": 1, "made_of": self._made_of, "documents": self.documents}
        write_json(self._folder / "building.json", {**note, "languages": sizes})
        self._noted = time.monotonic()

    def finish(
        self,
        languages: Sequence[str] | None,
        unusable: UnusableRecords,
        drop_duplicates: bool,
        record: Mapping[str, Any],
        known: Mapping[str, Sequence[np.ndarray]] | None = None,
    ) -> None:
        """Gives the files of these languages (None: all) the form that a store has, and writes
        store.json: `record`, the counts of each language, and the unusable records. known: hashes
        by language of documents, copies of which are left out; "known" in store.json has their
        numbers. UserError for languages without documents, and where none is left."""
        self.finished = True
        order = sorted(self._languages) if languages is None else languages
        missing = [language for language in order if language not in self._languages]
        if missing or not order:
            raise no_documents(missing, unusable)
        (self._folder / "building.json").unlink(missing_ok=True)
        counts, left_out = {}, {}
        for tag in order:
            counts[tag], left_out[tag] = self._languages[tag].finish(
                drop_duplicates, (known or {}).get(tag, ())
            )
        if known is not None:
            counts = {tag: count for tag, count in counts.items() if count["documents"]}
            record = {**record, "known": left_out}
            if not counts:
                raise UserError(
                    f"every document of the corpus in {', '.join(order)} is known already: it has "
                    f"{sum(left_out.values()):,} copies of documents of the text before"
                )
        found = {"languages": counts, "left_out": unusable.to_json()}
        write_json(self._folder / "store.json", {**record, **found})


def _resumed(folder: Path, made_of: Mapping[str, Any], dtype: np.dtype) -> StoreWriter | None:
    """Writer that continues the store in a folder; None if it is another store or damaged."""
    if not (folder / "building.json").exists():
        return None
    note = read_json(folder / "building.json")
    complete = all(
        path.exists() and path.stat().st_size >= size
        for tag, counts in note["languages"].items()
        for path, size in _sizes(folder, tag, dtype, *counts).items()
    )
    if note["made_of"] != made_of or not complete:
        return None
    return StoreWriter(folder, made_of, dtype, note["documents"], note["languages"])


def _sizes(
    folder: Path, language: str, dtype: np.dtype, tokens: int, documents: int
) -> dict[Path, int]:
    """Bytes of each file of a language with so many tokens and documents."""
    sizes = tokens * dtype.itemsize, *(documents * row for row in _ROW_BYTES)
    return dict(zip((folder / f"{language}.{kind}" for kind in _KINDS), sizes))


class _LanguageWriter:
    """Appends the documents of one language to its files."""

    def __init__(self, folder: Path, language: str, dtype: np.dtype, tokens: int, documents: int):
        """tokens, documents: numbers that are on disk; files are cut to them."""
        self.folder, self.language, self.dtype = folder, language, dtype
        self.tokens, self.documents = tokens, documents
        self.waiting: dict[Path, bytearray] = {}
        for path, size in _sizes(folder, language, dtype, tokens, documents).items():
            self.waiting[path] = bytearray()
            with path.open("ab") as file:
                file.truncate(size)

    def add(self, ids: Sequence[int], size: int, *others: np.ndarray) -> int:
        """Keeps a document in memory until the next `append`; returns its bytes. size: UTF-8 bytes
        of its text. others: its `CoverageCounts`, hash and signature."""
        parts = (np.asarray(ids, self.dtype), np.int64(len(ids)), np.int64(size), *others)
        contents = [part.tobytes() for part in parts]
        for waiting, content in zip(self.waiting.values(), contents, strict=True):
            waiting += content
        self.tokens += len(ids)
        self.documents += 1
        return sum(map(len, contents))

    def append(self, on_disk: bool = False) -> None:
        """Appends the documents in memory to the files; on_disk: and waits for the disk."""
        for path, waiting in self.waiting.items():
            if waiting or on_disk:
                with path.open("ab") as file:
                    file.write(waiting)
                    if on_disk:
                        file.flush()
                        os.fsync(file.fileno())
                waiting.clear()

    def finish(
        self, drop_duplicates: bool, known: Sequence[np.ndarray] = ()
    ) -> tuple[dict[str, int], int]:
        """Gives the files the form that a store has, without documents that have one of the `known`
        hashes; returns counts for store.json, and the number of those documents."""
        self.append()
        names = dict(zip(_KINDS, self.waiting))
        hashes = np.fromfile(names["hashes"], "<u8").reshape(-1, HASH_WORDS)
        elsewhere = np.zeros(len(hashes), bool)
        for others in known:
            elsewhere |= contained(hashes, others)
        again = copies(hashes) & ~elsewhere
        left_out = elsewhere | again if drop_duplicates else elsewhere
        if left_out.any():
            sizes = self.dtype.itemsize * np.fromfile(names["lengths"], np.int64)
            _keep(names["ids"], sizes, ~left_out)
            for kind, row in zip(_KINDS[1:], _ROW_BYTES):
                _keep(names[kind], np.full_like(sizes, row), ~left_out)
        lengths, sizes = (np.fromfile(names[kind], np.int64) for kind in ("lengths", "sizes"))
        order, stream_ends = shuffled(self.language, lengths)
        arrays = {"ends": lengths.cumsum(), "bytes": sizes, "order": order, "stream": stream_ends}
        for name, array in arrays.items():
            np.save(self.folder / f"{self.language}.{name}.npy", array)
        counts = np.fromfile(names["counts"], np.int32).reshape(-1, len(CoverageCounts._fields))
        for kind in ("lengths", "sizes", "counts"):
            names[kind].unlink()
        found = {
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "bytes": int(sizes.sum()),
            **CoverageCounts(*counts.sum(axis=0, dtype=np.int64).tolist())._asdict(),
            "duplicates": int(again.sum()),
        }
        return found, int(elsewhere.sum())


def _keep(path: Path, sizes: np.ndarray, kept: np.ndarray) -> None:
    """Cuts a file of documents, of so many bytes each, down to those kept."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    # Bytes at which runs of kept documents begin and end.
    edges = ends[np.flatnonzero(np.diff(kept, prepend=False, append=False))]
    partial = path.with_name(f"{path.name}.partial")
    with path.open("rb") as source, partial.open("wb") as target:
        for begin, end in edges.reshape(-1, 2).tolist():
            source.seek(begin)
            left = end - begin
            while left:
                piece = source.read(min(left, _COPIED_BYTES))
                target.write(piece)
                left -= len(piece)
    os.replace(partial, path)


def drop_languages(directory: Path, languages: Collection[str]) -> list[str]:
    """Deletes the text of some languages from a tokenised corpus, and returns those of which it
    has or had files. If this is interrupted, the corpus is without them, and the next call deletes
    what is left."""
    path = directory / "store.json"
    remove_unfinished(path)
    record = read_json(path, FORMAT)
    parts = ("languages", "origins", "languages_wanted")
    kept = dict(record)
    for part in parts:
        if isinstance(record.get(part), dict):
            kept[part] = {tag: one for tag, one in record[part].items() if tag not in languages}
        elif part in record:
            kept[part] = [tag for tag in record[part] if tag not in languages]
    if kept != record:
        write_json(path, kept)
    files = [file for tag in languages for file in directory.glob(f"{glob.escape(tag)}.*")]
    for file in files:
        file.unlink()
    return [tag for tag in languages if any(file.name.startswith(f"{tag}.") for file in files)]
