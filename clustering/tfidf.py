"""Documents -> clusters of documents with like words, by TF-IDF of subword ids.

Truncated SVD and balanced k-means follow. Knows how the vectors and clusters are fitted (X-ELM
section 3.1, after Gururangan et al. 2023). Terms are the model's own subword ids: the authors' word
tokens and stop lists break Devanagari, Chinese, Japanese and Thai. Applying a fit is `vectoriser`.
"""

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

from clustering import kmeans
from clustering.clustering import Clustering
from clustering.errors import UserError
from clustering.languages import canonical
from clustering.vectoriser import Vectoriser, check_ids

_POWER_ITERATIONS = 5
"""Of the randomised SVD, as in scikit-learn's TruncatedSVD, which the authors use."""
_BATCH_DOCUMENTS = 4096
"""Held at once while languages are counted."""


def fit(
    documents: Iterable[np.ndarray],
    vocabulary_size: int,
    dimensions: int = 100,
    random_seed: int = 0,
    *,
    sample_size: int = 100_000,
) -> Vectoriser:
    """TF-IDF weights and SVD projection of documents, integer arrays [tokens].

    idf(v) = ln((1 + n) / (1 + n_v)) + 1; rows of TF-IDF are scaled to unit length for the SVD, as
    in scikit-learn. From more than `sample_size` documents a random sample is drawn in one pass, so
    memory is bounded. There are fewer than `dimensions` where the documents span fewer. The same
    documents in the same order give the same result. Raises UserError if all are empty.
    """
    checked = (_checked(document, vocabulary_size) for document in documents)
    kept = _sample(checked, sample_size, np.random.default_rng(random_seed))
    if not kept:
        raise UserError("TF-IDF needs at least one document that is not empty; got none")
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
    documents: Iterable[tuple[np.ndarray, str]],
    vectoriser: Vectoriser,
    k: int,
    random_seed: int = 0,
    *,
    sample_size: int = 100_000,
    made_from: dict[str, str] | None = None,
) -> Clustering:
    """k clusters `c0`.. of documents, by balanced k-means on their vectors.

    documents: ids and language of each, read twice: to draw at most `sample_size` that are not
    empty, of which the centres are made, and to count the languages of each cluster by
    nearest-centre assignment, by which documents reach experts. So memory does not grow with their
    number. `made_from` names the inputs, such as corpus files and tokenizer, with their hashes.
    Raises ValueError for an iterator, which could be read once.
    """
    if iter(documents) is documents:
        raise ValueError("documents are read twice; got an iterator, which ends after once")
    ids = (np.asarray(document) for document, _ in documents)
    drawn = _sample(ids, sample_size, np.random.default_rng(random_seed))
    fitted = kmeans.fit(vectoriser.transform(drawn), k, random_seed)
    names = tuple(f"c{index}" for index in range(k))
    documents_in, tags = _count(documents, vectoriser, fitted.centres, names)
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
        clusters={name: tuple(counts) for name, counts in documents_in.items()},
        languages=tuple(tags),
        documents=documents_in,
        vectoriser=vectoriser,
        centres=fitted.centres,
        made_from=made_from or {},
    )


def _checked(document: np.ndarray, vocabulary_size: int) -> np.ndarray:
    ids = np.asarray(document)
    if len(ids):
        check_ids(ids, vocabulary_size)
    return ids


def _sample(
    documents: Iterable[np.ndarray], size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """A uniform sample of the documents that are not empty, in one pass (Vitter 1985)."""
    kept: list[np.ndarray] = []
    seen = 0
    for document in documents:
        if len(document) == 0:
            continue
        seen += 1
        slot = len(kept) if len(kept) < size else int(rng.integers(seen))
        if slot < size:
            kept[slot : slot + 1] = [document]
    return kept


def _count(
    documents: Iterable[tuple[np.ndarray, str]],
    vectoriser: Vectoriser,
    centres: np.ndarray,
    names: Sequence[str],
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Cluster -> language -> documents, the commonest language first, and all languages in the
    order in which they came."""
    tag_of: dict[str, str] = {}
    counts: dict[str, np.ndarray] = {}
    remaining = iter(documents)
    while batch := list(islice(remaining, _BATCH_DOCUMENTS)):
        labels = kmeans.assign(vectoriser.transform(ids for ids, _ in batch), centres)
        for label, (_, code) in zip(labels.tolist(), batch):
            tag = tag_of.get(code) or tag_of.setdefault(code, canonical(code))
            counts.setdefault(tag, np.zeros(len(names), np.int64))[label] += 1
    found = {}
    for number, name in enumerate(names):
        held = [(tag, int(row[number])) for tag, row in counts.items() if row[number]]
        found[name] = dict(sorted(held, key=lambda item: -item[1]))
    return found, list(counts)
