"""Documents -> clusters of documents with like words, by TF-IDF of subword ids.

Truncated SVD and balanced k-means follow. Knows how the vectors and clusters are fitted (X-ELM
section 3.1, after Gururangan et al. 2023). Terms are the model's own subword ids: the authors' word
tokens and stop lists break Devanagari, Chinese, Japanese and Thai. Applying a fit is `vectoriser`.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np

from clustering import kmeans
from clustering.clustering import Clustering
from clustering.documents import Documents
from clustering.errors import UserError
from clustering.languages import canonical
from clustering.vectoriser import Vectoriser, check_ids

SAMPLE_SIZE = 100_000
"""Documents that centres are made of, at most: more do not move them."""
_POWER_ITERATIONS = 5
"""Of the randomised SVD, as in scikit-learn's TruncatedSVD, which the authors use."""
_BATCH_DOCUMENTS = 4096
"""Held at once while languages are counted."""


def fit(
    documents: Iterable[np.ndarray],
    vocabulary_size: int,
    dimensions: int = 100,
    random_seed: int = 0,
) -> Vectoriser:
    """TF-IDF weights and SVD projection of documents, integer arrays [tokens].

    idf(v) = ln((1 + n) / (1 + n_v)) + 1; rows of TF-IDF are scaled to unit length for the SVD, as
    in scikit-learn. All documents are held at once: of very many, give `Documents.sample`. There
    are fewer than `dimensions` where the documents span fewer. The same documents in the same order
    give the same result. Raises UserError if all are empty.
    """
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
    # Directions beyond the rank are noise of the machine.
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

    The centres are made of `sample`, by default `SAMPLE_SIZE` of the documents; then all are read
    and the languages of each cluster counted by nearest-centre assignment, by which documents reach
    experts. So memory does not grow with their number, and the engine of `documents` does the
    reading. There are fewer than k where a centre is nearest to no document; `parameters` has the
    k that was wanted. `made_from` names the inputs, such as corpus files and tokenizer, with their
    hashes.
    """
    drawn = documents.sample(SAMPLE_SIZE, random_seed) if sample is None else sample
    fitted = kmeans.fit(vectoriser.transform(drawn), k, random_seed)
    counts = _total(documents.map(partial(_count, vectoriser, fitted.centres)))
    filled = np.flatnonzero(sum(counts.values(), np.zeros(len(fitted.centres), np.int64)))
    held = {
        f"c{number}": _in_cluster(counts, index) for number, index in enumerate(filled.tolist())
    }
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
        clusters={name: tuple(languages) for name, languages in held.items()},
        languages=tuple(counts),
        documents=held,
        vectoriser=vectoriser,
        centres=fitted.centres[filled],
        made_from=made_from or {},
    )


Counts = dict[str, np.ndarray]
"""Language -> documents by cluster, languages in the order in which they came."""


def _count(
    vectoriser: Vectoriser, centres: np.ndarray, documents: Iterator[tuple[np.ndarray, str]]
) -> Counts:
    counts: Counts = {}
    while batch := list(islice(documents, _BATCH_DOCUMENTS)):
        labels = kmeans.assign(vectoriser.transform(ids for ids, _ in batch), centres)
        for label, (_, code) in zip(labels.tolist(), batch):
            counts.setdefault(code, np.zeros(len(centres), np.int64))[label] += 1
    return counts


def _total(parts: Iterable[Counts]) -> Counts:
    """Of all parts, codes of the same language as one."""
    total: Counts = {}
    for counts in parts:
        for code, row in counts.items():
            tag = canonical(code)
            total[tag] = total.get(tag, 0) + row
    return total


def _in_cluster(counts: Counts, index: int) -> dict[str, int]:
    """Language -> documents in one cluster, the commonest first."""
    held = [(tag, int(row[index])) for tag, row in counts.items() if row[index]]
    return dict(sorted(held, key=lambda item: -item[1]))
