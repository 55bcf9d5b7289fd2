"""Clusters of documents with similar words: TF-IDF of subword ids, truncated SVD, balanced k-means.

The method is that of X-ELM (section 3.1, after Gururangan et al. 2023), except that terms are the
model's own subword ids: the authors' word tokens and stop lists break Devanagari, Chinese, Japanese
and Thai. `vectoriser` applies a fit.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import tee

import numpy as np

from clustering import kmeans
from clustering.clustering import Clustering
from clustering.documents import Documents
from clustering.errors import UserError
from clustering.languages import canonical
from clustering.vectoriser import Vectoriser, check_ids

SAMPLE_SIZE = 100_000
"""Number of documents to fit centres on, at most: more do not move the centres."""
_POWER_ITERATIONS = 5
"""Power iterations of the randomised SVD, as in scikit-learn's TruncatedSVD, which the authors
use."""


def fit(
    documents: Iterable[np.ndarray],
    vocabulary_size: int,
    dimensions: int = 100,
    random_seed: int = 0,
) -> Vectoriser:
    """TF-IDF weights and SVD projection, fitted on documents, integer arrays [tokens].

    idf(v) = ln((1 + n) / (1 + n_v)) + 1; rows of TF-IDF are scaled to unit length for the SVD, as
    in scikit-learn. All documents are in memory at once, so pass `Documents.sample` of very many.
    The dimensions are fewer than `dimensions` where the documents span fewer. The same documents in
    the same order give the same result. Raises UserError if all are empty."""
    kept = [ids for ids in map(np.asarray, documents) if len(ids)]
    if not kept:
        raise UserError("TF-IDF needs at least one document that is not empty; got none")
    for ids in kept:
        check_ids(ids, vocabulary_size)
    from scipy import sparse
    from sklearn.utils.extmath import randomized_svd

    ends = np.cumsum([0, *map(len, kept)])
    matrix = sparse.csr_array(
        (np.ones(ends[-1], np.float32), np.concatenate(kept), ends),
        shape=(len(kept), vocabulary_size),
    )
    matrix.sum_duplicates()
    frequency = np.bincount(matrix.indices, minlength=vocabulary_size)
    idf = (np.log((1 + len(kept)) / (1 + frequency)) + 1).astype(np.float32)
    matrix.data *= idf[matrix.indices]
    lengths = np.sqrt(np.add.reduceat(matrix.data**2, matrix.indptr[:-1]))
    matrix.data /= np.repeat(lengths, np.diff(matrix.indptr))
    wanted = min(dimensions, len(kept), vocabulary_size)
    _, singular, components = randomized_svd(
        matrix,
        wanted,
        n_iter=_POWER_ITERATIONS,  # pyright: ignore[reportArgumentType]  # int, or the word "auto"
        random_state=random_seed,
    )
    # Directions beyond the rank are rounding noise.
    components = components[singular > 1e-5 * singular[0]]
    projection = np.ascontiguousarray(components.T, dtype=np.float32)
    projection[frequency == 0] = 0.0
    return Vectoriser(idf=idf, projection=projection)


def cluster(
    documents: Documents,
    vectoriser: Vectoriser,
    k: int,
    random_seed: int = 0,
    *,
    sample: Sequence[np.ndarray] | None = None,
    made_from: dict[str, str] | None = None,
) -> Clustering:
    """k clusters `c0`.. of documents, by balanced k-means on their vectors.

    The centres are fitted on `sample`, by default `SAMPLE_SIZE` of the documents. Then the engine
    of `documents` reads all of them, and the languages in each cluster are counted by nearest
    centre, as documents are later given to experts; memory does not grow with their number. There
    are fewer clusters than k, which `parameters` has, where a centre is nearest to no document.
    `made_from` names the inputs, such as corpus files and tokenizer, with their hashes."""
    drawn = documents.sample(SAMPLE_SIZE, random_seed) if sample is None else sample
    fitted = kmeans.fit(vectoriser.transform(drawn), k, random_seed)
    counts: Counts = {}
    for part in documents.map(partial(_count, vectoriser, fitted.centres)):
        for code, row in part.items():  # codes of the same language count as one
            counts[canonical(code)] = counts.get(canonical(code), 0) + row
    filled = np.flatnonzero(sum(counts.values(), np.zeros(len(fitted.centres), np.int64)))
    by_cluster = {f"c{n}": _in_cluster(counts, index) for n, index in enumerate(filled.tolist())}
    return Clustering(
        method="tfidf",
        parameters={
            "k": k,
            "random_seed": random_seed,
            "dimensions": vectoriser.dimensions,
            "documents_fitted": len(fitted.rows),
            "sizes_while_fitting": list(fitted.sizes),
            "inertia": fitted.inertia,
            "iterations": fitted.iterations,
        },
        clusters={name: tuple(languages) for name, languages in by_cluster.items()},
        languages=tuple(counts),
        documents=by_cluster,
        vectoriser=vectoriser,
        centres=fitted.centres[filled],
        made_from=made_from or {},
    )


Counts = dict[str, np.ndarray]
"""Language, in order of appearance -> number of documents in each cluster."""


def _count(
    vectoriser: Vectoriser, centres: np.ndarray, documents: Iterator[tuple[np.ndarray, str]]
) -> Counts:
    counts: Counts = {}
    contents, languages = tee(documents)
    labels = vectoriser.nearest((ids for ids, _ in contents), centres)
    for label, (_, code) in zip(labels, languages):
        counts.setdefault(code, np.zeros(len(centres), np.int64))[label] += 1
    return counts


def _in_cluster(counts: Counts, index: int) -> dict[str, int]:
    """Language -> number of documents in one cluster, the most frequent first."""
    found = [(tag, int(row[index])) for tag, row in counts.items() if row[index]]
    return dict(sorted(found, key=lambda item: -item[1]))
