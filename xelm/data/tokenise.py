"""Tokenises a corpus into a store, in this process or in several."""

import functools
import itertools
import multiprocessing
import os
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
from jaxtyping import UInt64

from clustering.errors import UserError
from xelm.data import tokenizer as tokenizers
from xelm.data.coverage import Coverage
from xelm.data.duplicates import fingerprint_method, fingerprints
from xelm.data.parts import Document
from xelm.data.store import FORMAT, Store, open_store
from xelm.data.store_writer import writing
from xelm.data.tokenizer import Tokenizer
from xelm.data.unusable import UnusableRecords

# Documents tokenised at once, fewer if they are long: enough for the tokenizer's threads, little
# enough for memory.
BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 4_000_000
# Batches that are tokenised here before processes for the rest are worth starting.
_BATCHES_HERE = 4


def build_store(
    directory: str | Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    unusable: UnusableRecords,
    *,
    languages: Sequence[str] | None = None,
    facts: Mapping[str, Any] | None = None,
    workers: int = 1,
    coverage: Coverage | None = None,
    drop_duplicates: bool = False,
    known: Mapping[str, Sequence[UInt64[np.ndarray, "documents 2"]]] | None = None,
    described: Callable[[], Mapping[str, Any]] = dict,
    progress: Callable[[int], object] = lambda documents: None,
) -> Store:
    """Tokenises `documents` into `directory`, which appears complete or not at all.

    unusable: records that were left out, known when `documents` is at its end. languages: those of
    the documents, each of which must occur; None takes those that occur. facts: entries of
    store.json that tell a corpus and a tokenizer from others; with them, the next call continues
    one that was killed. workers: number of processes that tokenise; 1 is this one. coverage: None
    takes that of the tokenizer. drop_duplicates: leaves out every document that is an exact copy of
    an earlier one in its language; copies are counted either way. known: language -> hashes of
    documents, copies of which are left out too, and counted. described: makes further entries of
    store.json, once all documents are read. progress: is called with the
    number of documents in each batch.
    """
    target, coverage = Path(directory), coverage or Coverage(tokenizer)
    dtype = np.dtype("<u2" if tokenizer.size <= 2**16 else "<u4")
    made_of = {**(facts or {}), "dtype": dtype.str, "fingerprints": fingerprint_method()}
    identity = {**made_of, "wanted": None if languages is None else list(languages)}
    with writing(target, identity, dtype, resumable=facts is not None) as writer:
        progress(writer.documents)
        rest = itertools.islice(_read(documents), writer.documents, None)
        # Batches are tokenised ahead of those that are written.
        ahead, batches = itertools.tee(_batches(rest))
        for encoded, batch in zip(_encoded(tokenizer, workers, ahead), batches):
            texts = [document.text for document in batch]
            columns = encoded, coverage.count(texts, encoded), *fingerprints(texts)
            for document, ids, *found in zip(batch, *columns, strict=True):
                writer.add(document.language, ids, len(document.text.encode()), *found)
            progress(len(batch))
            writer.note_progress()
        record = {"format": FORMAT, **made_of, **described()}
        writer.finish(languages, unusable, drop_duplicates, record, known)
    return open_store(target)


def _read(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents; an OSError becomes a UserError, so that it is not taken for one of writing."""
    try:
        yield from documents
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{error.strerror or error}") from error


def _encoded(
    tokenizer: Tokenizer, workers: int, batches: Iterable[list[Document]]
) -> Iterator[Sequence[Sequence[int]]]:
    """Token ids of each batch. More processes are started only for more than a few batches."""
    texts = ([document.text for document in batch] for batch in batches)
    here = texts if workers == 1 else itertools.islice(texts, _BATCHES_HERE)
    yield from map(tokenizer.encode, here)
    for first in texts:
        yield from _in_processes(workers, tokenizer, itertools.chain([first], texts))


def _in_processes(
    count: int, tokenizer: Tokenizer, batches: Iterator[list[str]]
) -> Iterator[Sequence[Sequence[int]]]:
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.json"
            # `save` raises no OSError where the disk is full. The processes get a file: one that
            # ends before it has read its arguments would leave this process waiting.
            path.write_bytes(tokenizer.special.plain.to_str().encode())
            # Forks of a process with threads, such as JAX's, may never answer.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(count, context, functools.partial(_load, str(path))) as pool:
                try:
                    # All begin now: where one ends before others have begun, Python 3.11 may wait
                    # for ever for them to end. None is idle until the last has begun.
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
        # Must not be taken for an error of writing, for which the store would be deleted.
        where = error.filename or "processes that tokenise"
        raise UserError(f"{where}: {error.strerror or error}") from error


_backend: Any = None


def _load(path: str) -> None:
    global _backend
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Not by transformers, which takes seconds to import.
    import tokenizers as library

    _backend = library.Tokenizer.from_file(path)


def _end_with_parent() -> None:
    """Ends this process with its parent; it would wait for the next batch for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: list[str]) -> list[np.ndarray]:
    return [np.asarray(ids, np.uint32) for ids in tokenizers.encode(_backend, texts)]


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
