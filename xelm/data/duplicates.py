"""Finds duplicate documents: exact copies by a hash of the text, near copies by MinHash.

Lines and indents are a part of verse, code and tables, so texts that differ in white space alone
are near copies, not exact ones.

A store contains a hash and a signature of every document, so that texts can be compared with a
model's training text without reading it again. Whole documents are compared: a sentence from a long
document is not found.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt32, UInt64

HASH_WORDS = 2
"""Number of 64-bit words in the hash of a document's text."""
SIGNATURE_SIZE = 64
"""Number of values in a MinHash signature; the standard error of a similarity is at most 1/16."""
SHINGLE_CHARACTERS = 5
"""Length of the runs of characters by which documents are compared (Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, section 3.2.2). Words would need a segmenter for Chinese, Japanese and
Thai."""
NEAR = 0.8
"""Least Jaccard similarity of the sets of shingles of near copies."""
# Locality-sensitive hashing: with 16 bands of 4 values, a pair of similarity .8 shares a band with
# probability 1 - (1 - .8^4)^16 = .9998.
_BANDS = 16
_ROWS = SIGNATURE_SIZE // _BANDS
_CHUNK = 2**18
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, as in Fibonacci hashing


class Fingerprints(NamedTuple):
    """Hashes and signatures by which documents are compared."""

    hashes: UInt64[np.ndarray, "documents 2"]
    """Hash of each text as it is; equal for exact copies."""
    signatures: UInt32[np.ndarray, "documents 64"]
    """MinHash of each text's shingles, with runs of white space as one space and case folded."""


def fingerprint_method() -> dict[str, str | int]:
    """How fingerprints are made; only those that were made alike can be compared."""
    return {
        "hash": "blake2b-128 of the text as it is",
        "signature": f"rensa RMinHash {_minhash().ALGORITHM_VERSION}",
        "values": SIGNATURE_SIZE,
        "shingle_characters": SHINGLE_CHARACTERS,
    }


def text_hashes(texts: Sequence[str]) -> UInt64[np.ndarray, "documents 2"]:
    """Hashes of texts as they are."""
    size = 8 * HASH_WORDS
    digests = [hashlib.blake2b(text.encode(), digest_size=size).digest() for text in texts]
    return np.frombuffer(b"".join(digests), "<u8").reshape(len(texts), HASH_WORDS)


def fingerprints(texts: Sequence[str]) -> Fingerprints:
    """Fingerprints of texts (Broder 1997, On the resemblance and containment of documents)."""
    hashes = text_hashes(texts)
    shingles, ends = _shingles([" ".join(text.split()).casefold() for text in texts])
    offsets = np.concatenate([[0], ends]).astype(np.uint64)
    matrix = _minhash().digest_matrix_from_flat_token_hashes(shingles, offsets, SIGNATURE_SIZE, 1)
    return Fingerprints(hashes, np.asarray(matrix.to_rows(), "<u4").reshape(-1, SIGNATURE_SIZE))


def _minhash() -> Any:
    import rensa  # compiled, and without types

    return rensa.RMinHash  # type: ignore[attr-defined]


def copies(hashes: UInt64[np.ndarray, "documents 2"]) -> Bool[np.ndarray, " documents"]:
    """Whether each document is an exact copy of an earlier one."""
    order = np.lexsort(hashes.T)  # which is stable: the first of equal ones stays first
    ordered = hashes[order]
    again = np.zeros(len(hashes), bool)
    again[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return again


def contained(
    hashes: UInt64[np.ndarray, "documents 2"], others: UInt64[np.ndarray, "others 2"]
) -> Bool[np.ndarray, " documents"]:
    """Whether each document is an exact copy of one of the others, which may be memory-mapped."""
    found, known = np.zeros(len(hashes), bool), {row.tobytes() for row in hashes}
    there: set[bytes] = set()
    for first in range(0, len(others), _CHUNK):
        some = np.asarray(others[first : first + _CHUNK])
        likely = some[np.isin(some[:, 0], hashes[:, 0])]
        there |= known & {row.tobytes() for row in likely}
    if there:
        found[:] = [row.tobytes() in there for row in hashes]
    return found


class Overlap(NamedTuple):
    """Documents that also occur in other text."""

    exact: Bool[np.ndarray, " documents"]
    """Whether an exact copy occurs there."""
    near: Bool[np.ndarray, " documents"]
    """Whether a near copy occurs there, and no exact one."""


def overlap(mine: Fingerprints, others: Sequence[Fingerprints]) -> Overlap:
    """Documents of `mine` that also occur in the others. These may be memory-mapped and large: they
    are read once, in chunks."""
    exact, near = (np.zeros(len(mine.hashes), bool) for _ in range(2))
    places: dict[bytes, list[int]] = {}
    for number, row in enumerate(mine.hashes):
        places.setdefault(row.tobytes(), []).append(number)
    bands = _bands(mine.signatures)
    orders = [np.argsort(band) for band in bands]
    keys = [band[order] for band, order in zip(bands, orders)]
    for hashes, signatures in _chunks(others):
        for row in hashes[np.isin(hashes[:, 0], mine.hashes[:, 0])]:
            exact[places.get(row.tobytes(), [])] = True
        for band, order, mine_sorted in zip(_bands(signatures), orders, keys):
            found = np.flatnonzero(np.isin(band, mine_sorted))
            begins = np.searchsorted(mine_sorted, band[found], "left")
            ends = np.searchsorted(mine_sorted, band[found], "right")
            for theirs, begin, end in zip(found, begins, ends):
                numbers = order[begin:end]
                numbers = numbers[~near[numbers]]
                alike = (mine.signatures[numbers] == signatures[theirs]).mean(axis=1) >= NEAR
                near[numbers[alike]] = True
    return Overlap(exact, near & ~exact)


def _chunks(others: Sequence[Fingerprints]) -> Iterator[Fingerprints]:
    for other in others:
        for first in range(0, len(other.hashes), _CHUNK):
            part = slice(first, first + _CHUNK)
            yield Fingerprints(np.asarray(other.hashes[part]), np.asarray(other.signatures[part]))


def _bands(signatures: UInt32[np.ndarray, "documents 64"]) -> UInt64[np.ndarray, "16 documents"]:
    """Keys of the documents for each band of their signatures."""
    values = signatures.astype(np.uint64).reshape(len(signatures), _BANDS, _ROWS)
    keys = values[:, :, 0]
    for row in range(1, _ROWS):
        keys = (keys ^ (keys >> np.uint64(29))) * _MIX + values[:, :, row]
    return np.ascontiguousarray(keys.T)


def _shingles(
    texts: Sequence[str],
) -> tuple[UInt64[np.ndarray, " shingles"], UInt64[np.ndarray, " documents"]]:
    """Hashes of all runs of characters in the texts, and the index at which those of each text end.
    A text that is shorter than a run counts as one run."""
    padded = "".join(text.ljust(SHINGLE_CHARACTERS, "\0") for text in texts)
    codes = np.frombuffer(padded.encode("utf-32-le"), "<u4").astype(np.uint64)
    sizes = np.asarray([max(len(text), SHINGLE_CHARACTERS) for text in texts])
    ends, beyond = np.cumsum(sizes), SHINGLE_CHARACTERS - 1
    hashes = codes[: len(codes) - beyond].copy()
    for place in range(1, SHINGLE_CHARACTERS):
        hashes = (hashes ^ (hashes >> np.uint64(29))) * _MIX
        hashes += codes[place : len(codes) - beyond + place]
    hashes = (hashes ^ (hashes >> np.uint64(32))) * _MIX
    hashes ^= hashes >> np.uint64(29)
    # Runs that begin in one text and end in the next.
    inside = np.ones(len(codes), bool)
    inside[ends[:, None] - 1 - np.arange(beyond)] = False
    return hashes[inside[: len(hashes)]], np.cumsum(sizes - beyond).astype(np.uint64)
