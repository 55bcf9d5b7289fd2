"""TF-IDF vectors of documents, from their subword ids by a fitted projection.

A vector is h = s / ||s|| with s = sum_u idf(x_u) P[x_u]: with raw counts, s is one running sum over
the tokens. `tfidf` fits idf and P.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

from clustering import kmeans
from clustering.values import ArrayValue

_TOKENS_PER_CHUNK = 1 << 18
"""Number of tokens that are transformed at a time, which bounds the memory: some 200 MB of distinct
terms at 100 dimensions in the worst case."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Vectoriser(ArrayValue):
    """A fitted TF-IDF and SVD; in shapes, V is the vocabulary and D the dimensions."""

    idf: Float[np.ndarray, " V"]
    """Inverse document frequency of each term, float32."""
    projection: Float[np.ndarray, "V D"]
    """P, the right singular vectors, float32; rows of zeros for terms not seen in fitting."""

    def __post_init__(self) -> None:
        if self.projection.ndim != 2 or self.idf.shape != self.projection.shape[:1]:
            raise ValueError(
                "idf must be [V] and projection [V, D]; "
                f"got {self.idf.shape} and {self.projection.shape}"
            )

    @property
    def vocabulary_size(self) -> int:
        """Number of terms, V."""
        return self.projection.shape[0]

    @property
    def dimensions(self) -> int:
        """Number of dimensions of a vector, D."""
        return self.projection.shape[1]

    def transform(self, documents: Iterable[np.ndarray]) -> Float[np.ndarray, "documents D"]:
        """Unit vectors h, float32; zero for a document that is empty or has only unseen terms.

        `documents` are integer arrays [tokens]. Raises ValueError for an id outside the vocabulary.
        """
        blocks = [_unit(self.sums(chunk)) for chunk in _chunks(documents)]
        return np.concatenate([np.zeros((0, self.dimensions), np.float32), *blocks])

    def nearest(
        self, documents: Iterable[np.ndarray], centres: Float[np.ndarray, "C D"]
    ) -> Iterator[int]:
        """Index of the centre nearest to each document's vector; reads a batch at a time."""
        for chunk in _chunks(documents):
            yield from kmeans.assign(_unit(self.sums(chunk)), centres).tolist()

    def terms(self, ids: Integer[np.ndarray, " T"]) -> Float[np.ndarray, "T D"]:
        """Terms that the ids add to s, float64, so that sums over long documents are exact to 1e-6
        in any order. Raises ValueError for an id outside the vocabulary."""
        check_ids(ids, self.vocabulary_size)
        return self.idf[ids, None].astype(np.float64) * self.projection[ids]

    def sums(self, documents: Sequence[np.ndarray]) -> Float[np.ndarray, "documents D"]:
        """Sums s of documents, integer ids [tokens], float64. Raises ValueError for an id outside
        the vocabulary."""
        from scipy import sparse

        ids = np.concatenate(documents)
        check_ids(ids, self.vocabulary_size)
        # Like np.unique with return_inverse, without sorting.
        seen = np.zeros(self.vocabulary_size, bool)
        seen[ids] = True
        terms, place = np.flatnonzero(seen), np.cumsum(seen, dtype=np.int32) - 1
        ends = np.cumsum([0, *(len(document) for document in documents)])
        # Repeated columns add up in the product, so they need not be counted first.
        counts = sparse.csr_array(
            (np.ones(len(ids)), place[ids], ends), shape=(len(documents), len(terms))
        )
        return counts @ self.terms(terms)


def check_ids(ids: np.ndarray, vocabulary_size: int) -> None:
    """Raises ValueError unless all ids are integers in 0..vocabulary_size-1."""
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim != 1:
        raise ValueError(f"subword ids must be integers [tokens]; got {ids.dtype} {ids.shape}")
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary_size:
        raise ValueError(
            f"subword ids must be in 0..{vocabulary_size - 1}; got {ids.min()}..{ids.max()}"
        )


def _chunks(documents: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    chunk: list[np.ndarray] = []
    tokens = 0
    for document in documents:
        ids = np.asarray(document)
        chunk.append(ids if len(ids) else np.zeros(0, np.int64))  # np.asarray([]) would be float
        tokens += len(ids)
        if tokens >= _TOKENS_PER_CHUNK:
            yield chunk
            chunk, tokens = [], 0
    if chunk:
        yield chunk


def _unit(sums: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.divide(sums, norms, out=np.zeros_like(sums), where=norms > 0).astype(np.float32)
