"""Tokenises a corpus into a store, here or in several processes, and goes on after a crash.

While it is made, a store lies in a hidden folder beside its place; building.json there says how far
it is, and what is in the files beyond that is cut off when it goes on.
"""

import functools
import itertools
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from clustering.errors import UserError
from clustering.files import flush, read_json, write_json
from xelm.data import tokenizer as tokenizers
from xelm.data.coverage import Coverage, CoverageCounts
from xelm.data.duplicates import (
    HASH_WORDS,
    SIGNATURE_SIZE,
    copies,
    fingerprint_method,
    fingerprints,
)
from xelm.data.parts import Document, no_documents
from xelm.data.store import FORMAT, Store, open_store, shuffled
from xelm.data.tokenizer import Tokenizer
from xelm.data.unusable import UnusableRecords

# Documents tokenised at once, fewer if they are long: enough for the tokenizer's threads, little
# enough for memory.
BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 4_000_000
# Of these, so many are tokenised before processes for the rest are worth starting.
_BATCHES_HERE = 4
# Between notes of how far it is.
NOTE_SECONDS = 10.0
_COPIED_BYTES = 2**24
# Of all languages together, that wait to be appended to files.
_WAITING_BYTES = 2**26

Encode = Callable[[Iterator[list[str]]], Iterator[Sequence[Sequence[int]]]]
"""Batches of texts -> ids of each text, batch by batch."""


def build_store(
    directory: str | Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    faults: UnusableRecords,
    *,
    languages: Iterable[str] | None = None,
    facts: Mapping[str, Any] | None = None,
    encode: Encode | None = None,
    spelling: Coverage | None = None,
    drop_duplicates: bool = False,
    progress: Callable[[int], object] = lambda documents: None,
) -> Store:
    """Tokenises `documents` into `directory`, which appears whole or not at all.

    languages: those to keep, each of which must turn up; None keeps all. Documents of other
    languages are counted as left out. facts: entries for store.json, which tell a corpus and a
    tokenizer from others: with them, a call that was killed is gone on with by the next. encode: by
    default that of the tokenizer, in this process. spelling: counts what the tokenizer could not
    spell; by default made of the tokenizer. drop_duplicates: leaves out every document that is
    an exact copy of an earlier one in its language; they are counted either way. progress: is told
    how many documents each batch held.
    """
    target = Path(directory)
    partial = target.with_name(f".{target.name}.partial")
    dtype = np.dtype("<u2" if tokenizer.size <= 2**16 else "<u4")
    wanted = None if languages is None else list(languages)
    made_of = {
        **(facts or {}),
        "dtype": dtype.str,
        "wanted": wanted,
        "fingerprints": fingerprint_method(),
    }
    spelling = spelling or Coverage(tokenizer)
    encode = encode or (lambda batches: map(tokenizer.encode, batches))
    keep = facts is not None  # what is done by then, to be gone on with
    try:
        done, files = _begun(partial, made_of if facts else None, dtype)
        progress(done)
        kept_documents = itertools.islice(kept(documents, wanted, faults), done, None)
        noted = time.monotonic()
        for batch, encoded in _encoded(_batches(kept_documents), encode):
            texts = [document.text for document in batch]
            counts, (hashes, signatures) = spelling.count(texts, encoded), fingerprints(texts)
            for number, (document, ids) in enumerate(zip(batch, encoded, strict=True)):
                size = len(document.text.encode())
                facts_of = counts[number], hashes[number], signatures[number]
                files.add(document.language, ids, size, *facts_of)
            done += len(batch)
            progress(len(batch))
            if time.monotonic() > noted + NOTE_SECONDS:
                files.note(made_of, done)
                noted = time.monotonic()
        keep = False
        languages_found = files.finish(wanted, faults, drop_duplicates)
        record = {"format": FORMAT, **(facts or {}), "dtype": dtype.str}
        record |= {"fingerprints": fingerprint_method(), "languages": languages_found}
        write_json(partial / "store.json", {**record, "left_out": faults.to_json()})
        flush(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except OSError as error:
        keep = False  # the disk may be full of it
        raise UserError(f"cannot write {target}: {error.strerror}; nothing was changed") from error
    finally:
        if not keep:
            shutil.rmtree(partial, ignore_errors=True)
    return open_store(target)


def in_processes(tokenizer: Tokenizer, count: int) -> Encode:
    """The tokenizer's encoding by so many processes, once there are more than a few batches."""

    def encode(batches: Iterator[list[str]]) -> Iterator[Sequence[Sequence[int]]]:
        yield from map(tokenizer.encode, itertools.islice(batches, _BATCHES_HERE))
        for first in batches:
            yield from _encoded_by(count, tokenizer, itertools.chain([first], batches))

    return encode


def _encoded_by(
    count: int, tokenizer: Tokenizer, batches: Iterator[list[str]]
) -> Iterator[Sequence[Sequence[int]]]:
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.json"
            # As its `save` writes it, which raises no OSError where the disk is full. By a file: a
            # process that ends before it has read all that it is given leaves whoever started it
            # waiting.
            path.write_bytes(tokenizer.special.plain.to_str().encode())
            # Forks of a process with threads, such as JAX's, may never answer.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(count, context, functools.partial(_load, str(path))) as pool:
                try:
                    # All begin now: where one ends while others are yet to begin, Python 3.11 may
                    # wait for their end for ever. None is idle until the last is there.
                    for _ in range(count):
                        pool.submit(time.sleep, 0.02 * count)
                    waiting = deque()
                    for batch in batches:
                        waiting.append(pool.submit(_encode, batch))
                        if len(waiting) > 3 * count:
                            yield waiting.popleft().result()
                    while waiting:
                        yield waiting.popleft().result()
                finally:
                    pool.shutdown(cancel_futures=True)
    except BrokenProcessPool as error:
        raise UserError("a process that tokenises was killed; run this again") from error
    except OSError as error:
        # Not to be taken for one of writing the store, of which what is done would be deleted.
        where = error.filename or "processes that tokenise"
        raise UserError(f"{where}: {error.strerror or error}") from error


_backend: Any = None


def _load(path: str) -> None:
    global _backend
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this ends it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Not by transformers, which take seconds to import.
    import tokenizers as library

    _backend = library.Tokenizer.from_file(path)


def _end_with_parent() -> None:
    """However that ends: these processes would wait for its next batch for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: list[str]) -> list[np.ndarray]:
    return [np.asarray(ids, np.uint32) for ids in tokenizers.encode(_backend, texts)]


def _encoded(
    batches: Iterator[list[Document]], encode: Encode
) -> Iterator[tuple[list[Document], Sequence[Sequence[int]]]]:
    """Each batch with the ids of its texts; more batches may be on their way."""
    waiting: deque[list[Document]] = deque()

    def texts() -> Iterator[list[str]]:
        for batch in batches:
            waiting.append(batch)
            yield [document.text for document in batch]

    for ids in encode(texts()):
        yield waiting.popleft(), ids


def _begun(
    partial: Path, made_of: Mapping[str, Any] | None, dtype: np.dtype
) -> tuple[int, "_Files"]:
    """How many documents are done, and the files to go on with."""
    note = {}
    if made_of is not None and (partial / "building.json").exists():
        note = read_json(partial / "building.json")
    whole = all(
        path.exists() and path.stat().st_size >= size
        for tag, counts in note.get("languages", {}).items()
        for path, size in zip(paths_of(partial, tag), sizes_of(counts[0], counts[1], dtype))
    )
    if note.get("made_of") != made_of or not note or not whole:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return 0, _Files(partial, dtype, {})
    return note["documents"], _Files(partial, dtype, note["languages"])


class _Files:
    """Those of a store in the making. One is open at a time, for there may be more than a process
    may have open."""

    def __init__(self, folder: Path, dtype: np.dtype, sizes: Mapping[str, Sequence[int]]):
        """sizes: language -> tokens and documents that are there already."""
        self.folder, self.dtype, self.waiting = folder, dtype, 0
        self.languages = {
            tag: _Writer(folder, tag, dtype, *counts) for tag, counts in sizes.items()
        }

    def add(self, language: str, *parts: Any) -> None:
        """A document's, as in `_Writer.add`."""
        if language not in self.languages:
            self.languages[language] = _Writer(self.folder, language, self.dtype, 0, 0)
        self.waiting += self.languages[language].add(*parts)
        if self.waiting > _WAITING_BYTES:
            for writer in self.languages.values():
                writer.append()
            self.waiting = 0

    def note(self, made_of: Mapping[str, Any], documents: int) -> None:
        """Writes down how far it is."""
        sizes = {tag: writer.flushed() for tag, writer in self.languages.items()}
        self.waiting = 0
        note = {"format": 1, "made_of": made_of, "documents": documents, "languages": sizes}
        write_json(self.folder / "building.json", note)

    def finish(
        self, wanted: Sequence[str] | None, faults: UnusableRecords, drop_duplicates: bool
    ) -> dict[str, dict[str, int]]:
        """Counts by language, once the files are as a store has them."""
        order = sorted(self.languages) if wanted is None else wanted
        missing = [language for language in order if language not in self.languages]
        if missing or not order:
            raise no_documents(missing, faults)
        (self.folder / "building.json").unlink(missing_ok=True)
        return {language: self.languages[language].finish(drop_duplicates) for language in order}


_KINDS = ("ids", "lengths", "sizes", "counts", "hashes", "signatures")


def paths_of(folder: Path, language: str) -> list[Path]:
    """Of a store in the making: ids, then what is known of each document, which may be many
    millions and wait in files."""
    return [folder / f"{language}.{kind}" for kind in _KINDS]


def sizes_of(tokens: int, documents: int, dtype: np.dtype) -> tuple[int, ...]:
    """Bytes of these files."""
    rows = (8, 8, 4 * len(CoverageCounts._fields), 8 * HASH_WORDS, 4 * SIGNATURE_SIZE)
    return tokens * dtype.itemsize, *(documents * row for row in rows)


class _Writer:
    """Appends the documents of one language to its files."""

    def __init__(self, folder: Path, language: str, dtype: np.dtype, tokens: int, documents: int):
        """tokens, documents: what is there already; files are cut to it."""
        self.folder, self.language, self.dtype = folder, language, dtype
        self.tokens, self.documents = tokens, documents
        self.paths = paths_of(folder, language)
        self.waiting = [bytearray() for _ in self.paths]
        for path, size in zip(self.paths, sizes_of(tokens, documents, dtype)):
            with path.open("ab") as file:
                file.truncate(size)

    def add(
        self,
        ids: Sequence[int],
        size: int,
        counts: np.ndarray,
        fingerprint: np.ndarray,
        signature: np.ndarray,
    ) -> int:
        """Takes a document, which waits in memory; returns its bytes."""
        parts = (np.asarray(ids, self.dtype), np.int64(len(ids)), np.int64(size))
        contents = [part.tobytes() for part in (*parts, counts, fingerprint, signature)]
        for waiting, content in zip(self.waiting, contents):
            waiting += content
        self.tokens += len(ids)
        self.documents += 1
        return sum(map(len, contents))

    def append(self, on_disk: bool = False) -> None:
        """Appends what waits to the files; on_disk: returns once all of them is on disk."""
        for path, waiting in zip(self.paths, self.waiting):
            if waiting or on_disk:
                with path.open("ab") as file:
                    file.write(waiting)
                    if on_disk:
                        file.flush()
                        os.fsync(file.fileno())
                waiting.clear()

    def flushed(self) -> tuple[int, int]:
        """Tokens and documents, once they are on disk."""
        self.append(on_disk=True)
        return self.tokens, self.documents

    def finish(self, drop_duplicates: bool) -> dict[str, int]:
        self.append()
        names = dict(zip(_KINDS, self.paths))
        again = copies(np.fromfile(names["hashes"], "<u8").reshape(-1, HASH_WORDS))
        if drop_duplicates and again.any():
            lengths = np.fromfile(names["lengths"], np.int64)
            for kind, size in zip(_KINDS, sizes_of(1, 1, self.dtype)):
                units = lengths if kind == "ids" else np.ones_like(lengths)
                _keep(names[kind], size * units, ~again)
        lengths, sizes = (np.fromfile(names[kind], np.int64) for kind in ("lengths", "sizes"))
        order, stream_ends = shuffled(self.language, lengths)
        arrays = {"ends": lengths.cumsum(), "bytes": sizes, "order": order, "stream": stream_ends}
        for name, array in arrays.items():
            np.save(self.folder / f"{self.language}.{name}.npy", array)
        counts = np.fromfile(names["counts"], np.int32).reshape(-1, len(CoverageCounts._fields))
        for kind in ("lengths", "sizes", "counts"):
            names[kind].unlink()
        return {
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "bytes": int(sizes.sum()),
            **CoverageCounts(*counts.sum(axis=0, dtype=np.int64).tolist())._asdict(),
            "duplicates": int(again.sum()),
        }


def _keep(path: Path, sizes: np.ndarray, wanted: np.ndarray) -> None:
    """Cuts a file of documents, of so many bytes each, down to those wanted."""
    ends = np.cumsum(sizes)
    # Where runs of wanted documents begin and end.
    edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False))
    partial = path.with_name(f"{path.name}.partial")
    with path.open("rb") as source, partial.open("wb") as target:
        for first, last in edges.reshape(-1, 2):
            begin = int(ends[first - 1]) if first else 0
            source.seek(begin)
            left = int(ends[last - 1]) - begin
            while left:
                piece = source.read(min(left, _COPIED_BYTES))
                target.write(piece)
                left -= len(piece)
    os.replace(partial, path)


def kept(
    documents: Iterable[Document], wanted: Sequence[str] | None, faults: UnusableRecords
) -> Iterator[Document]:
    """The documents in the `wanted` languages, or all if None; others are counted in `faults`."""
    try:
        for number, document in enumerate(documents, 1):
            if wanted is None or document.language in wanted:
                yield document
            else:
                reason = f"language {document.language}, which was not requested"
                faults.add(reason, f"record {number}")
    except OSError as error:
        # Of reading, which the caller must not take for one of writing.
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{error.strerror or error}") from error


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
