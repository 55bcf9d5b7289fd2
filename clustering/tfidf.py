"""Documents -> clusters of documents with like words, by TF-IDF of subword ids.

Truncated SVD and balanced k-means follow. Knows how the vectors and clusters are fitted (X-ELM
section 3.1, after Gururangan et al. 2023). Terms are the model's own subword ids: the authors' word
tokens and stop lists break Devanagari, Chinese, Japanese and Thai. Applying a fit is `vectoriser`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from clustering import kmeans
from clustering.clustering import Clustering
from clustering.errors import UserError
from clustering.languages import canonical
from clustering.vectoriser import Vectoriser, check_ids

_POWER_ITERATIONS = 5
"""Of the randomised SVD, as in scikit-learn's TruncatedSVD, which the authors use."""


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
    terms = _sample(documents, vocabulary_size, sample_size, np.random.default_rng(random_seed))
    if not terms:
        raise UserError("TF-IDF needs at least one document that is not empty; got none")
    from scipy import sparse
    from sklearn.utils.extmath import randomized_svd

    ids = np.concatenate([document.ids for document in terms])
    counts = np.concatenate([document.counts for document in terms])
    ends = np.cumsum([0, *(len(document.ids) for document in terms)])
    frequency = np.bincount(ids, minlength=vocabulary_size)
    idf = (np.log((1 + len(terms)) / (1 + frequency)) + 1).astype(np.float32)
    weights = counts * idf[ids].astype(np.float64)
    lengths = np.sqrt(np.add.reduceat(weights**2, ends[:-1]))
    weights /= np.repeat(lengths, np.diff(ends))
    matrix = sparse.csr_array((weights, ids, ends), shape=(len(terms), vocabulary_size))
    wanted = min(dimensions, len(terms), vocabulary_size)
    _, singular, components = randomized_svd(
        matrix,
        wanted,
        n_iter=_POWER_ITERATIONS,  # pyright: ignore[reportArgumentType]  # int, or the word "auto"
        random_state=random_seed,
    )
    # Directions beyond the rank are noise of the machine.
    kept = singular > 1e-6 * singular[0]
    projection = np.ascontiguousarray(components[kept].T, dtype=np.float32)
    projection[frequency == 0] = 0.0
    return Vectoriser(idf=idf, projection=projection)


def cluster(
    documents: Iterable[np.ndarray],
    languages_of_documents: Sequence[str],
    vectoriser: Vectoriser,
    k: int,
    random_seed: int = 0,
    *,
    made_from: dict[str, str] | None = None,
) -> Clustering:
    """k clusters `c0`.. of documents, by balanced k-means on their vectors [documents, D].

    All vectors are held in memory. The counts of each language in each cluster are those of
    nearest-centre assignment, by which documents reach experts. `made_from` names the inputs, such
    as corpus files and tokenizer, with their hashes.
    """
    vectors = vectoriser.transform(documents)
    if len(vectors) != len(languages_of_documents):
        raise ValueError(
            f"one language for each of {len(vectors)} documents wanted; "
            f"got {len(languages_of_documents)}"
        )
    tag_of = {code: canonical(code) for code in dict.fromkeys(languages_of_documents)}
    tags = [tag_of[code] for code in languages_of_documents]
    fitted = kmeans.fit(vectors, k, random_seed)
    names = tuple(f"c{index}" for index in range(k))
    documents_in = _count(kmeans.assign(vectors, fitted.centres), tags, names)
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
        languages=tuple(dict.fromkeys(tags)),
        documents=documents_in,
        vectoriser=vectoriser,
        centres=fitted.centres,
        made_from=made_from or {},
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Document:
    ids: Integer[np.ndarray, " terms"]
    """Distinct ids, ascending."""
    counts: Integer[np.ndarray, " terms"]
    """How often each occurs."""


def _sample(
    documents: Iterable[np.ndarray], vocabulary_size: int, size: int, rng: np.random.Generator
) -> list[_Document]:
    """A uniform sample of the documents that are not empty, in one pass (Vitter 1985)."""
    kept: list[_Document] = []
    seen = 0
    for document in documents:
        ids = np.asarray(document)
        if len(ids) == 0:
            continue
        check_ids(ids, vocabulary_size)
        seen += 1
        slot = len(kept) if len(kept) < size else int(rng.integers(seen))
        if slot >= size:
            continue
        distinct, counts = np.unique(ids, return_counts=True)
        entry = _Document(ids=distinct, counts=counts)
        kept[slot : slot + 1] = [entry]
    return kept


def _count(
    labels: np.ndarray, tags: Sequence[str], names: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Cluster -> language -> documents, the commonest language first."""
    order = {tag: index for index, tag in enumerate(dict.fromkeys(tags))}
    table = np.zeros((len(names), len(order)), np.int64)
    np.add.at(table, (labels, np.array([order[tag] for tag in tags])), 1)
    counts = {}
    for name, row in zip(names, table.tolist(), strict=True):
        held = [(tag, row[at]) for tag, at in order.items() if row[at]]
        counts[name] = dict(sorted(held, key=lambda item: -item[1]))
    return counts
