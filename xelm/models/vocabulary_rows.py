"""Tables of a model for more or fewer ids than it has: rows of new pieces, before training and in
models that never had them.

A new row is a linear combination of the rows of old ids, the same one for the embedding and the
output head: a matrix [new, old], which is mostly zero. Each method makes that matrix."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from jaxtyping import Float, Int, Integer

from xelm.models.config import ModelConfig

TABLES = ("embedding", "head", "head_bias")
"""Parameters with one row for each id."""
DIMENSIONS, WINDOW = 64, 4
"""Size of the auxiliary vectors, and tokens on either side that are a token's context."""

Combination = scipy.sparse.csr_array
"""Weights [new, old]."""


def mean_weights(expansions: Sequence[Sequence[int]], old: int) -> Combination:
    """The mean of the pieces that a new one stands for (Gee et al. 2022, arXiv 2402.09977)."""
    sizes = np.asarray([max(1, len(ids)) for ids in expansions])
    ends = np.cumsum([0, *map(len, expansions)])
    columns = np.asarray([id for ids in expansions for id in ids], np.int64)
    values = np.repeat(1 / sizes, [len(ids) for ids in expansions])
    return Combination((values, columns, ends), shape=(len(expansions), old))


def focus_weights(
    vectors: Float[np.ndarray, "V A"], counts: Int[np.ndarray, " V"], mean: Combination
) -> Combination:
    """Similar old pieces, by the sparsemax of cosines in an auxiliary space (FOCUS: Dobler & de
    Melo 2023, arXiv 2305.14481, section 3; the space there is fastText's). Pieces that the text
    lacks have their `mean`.

    vectors, counts: of all old and new ids, as by `auxiliary_vectors`."""
    new = len(mean.indptr) - 1
    old = len(vectors) - new
    seen = np.flatnonzero((counts[:old] > 0) & vectors[:old].any(axis=1))
    found = mean.tolil()
    for number in range(new):
        target = vectors[old + number]
        if counts[old + number] and target.any() and len(seen):
            weights = _sparsemax(vectors[seen] @ target)
            chosen = np.flatnonzero(weights)
            found.rows[number] = seen[chosen].tolist()
            found.data[number] = weights[chosen].tolist()
    return found.tocsr()


METHODS: Mapping[str, Callable[..., Combination] | None] = {
    "mean": None,
    "focus": focus_weights,
}
"""Method by name; None takes the mean alone."""


def auxiliary_vectors(
    documents: Sequence[Integer[np.ndarray, " _"]], size: int
) -> tuple[Float[np.ndarray, "V A"], Int[np.ndarray, " V"]]:
    """Unit vectors of ids by the company they keep in some documents, and how often each occurs: a
    truncated SVD of positive pointwise mutual information (Levy & Goldberg 2014)."""
    ids = np.concatenate([np.zeros(0, np.int64), *documents])
    numbers = np.repeat(np.arange(len(documents)), [len(each) for each in documents])
    counts = np.bincount(ids, minlength=size)
    pairs = scipy.sparse.csr_array((size, size))
    for distance in range(1, WINDOW + 1):
        together = numbers[:-distance] == numbers[distance:]
        places = (ids[:-distance][together], ids[distance:][together])
        found = scipy.sparse.coo_array((np.ones(together.sum()), places), shape=(size, size))
        pairs = pairs + found.tocsr()
    pairs = (pairs + pairs.T).tocoo()
    sums = np.maximum(pairs.sum(axis=1), 1)
    values = np.log(pairs.data * pairs.sum() / sums[pairs.row] / sums[pairs.col])
    kept = values > 0
    places = (pairs.row[kept], pairs.col[kept])
    matrix = scipy.sparse.csr_array((values[kept], places), shape=(size, size))
    rank = min(DIMENSIONS, size - 1)
    start = np.random.default_rng(0).normal(size=size)
    left, strengths, _ = scipy.sparse.linalg.svds(matrix, rank, v0=start)
    vectors = left * np.sqrt(strengths)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 1e-9), counts


def _sparsemax(scores: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The nearest probabilities to some scores (Martins & Astudillo 2016, arXiv 1602.02068)."""
    ordered = np.sort(scores)[::-1]
    sums = np.cumsum(ordered) - 1
    support = int((ordered * np.arange(1, len(ordered) + 1) > sums).sum())
    return np.maximum(scores - sums[support - 1] / support, 0)


def with_new_rows(
    parameters: Mapping[str, Any], first: int, weights: Combination
) -> dict[str, Any]:
    """Parameters with rows of new ids from `first` on, on the host. Ids between the last row and
    that one, which no text has, get the mean of all rows."""
    found = dict(parameters)
    for name in TABLES:
        if name in parameters:
            table = np.asarray(parameters[name], np.float32)
            between = np.repeat(table.mean(axis=0, keepdims=True), first - len(table), axis=0)
            new = weights[:, : len(table)] @ table
            whole = np.concatenate([table, between, new]).astype(np.float32)
            found[name] = whole.astype(parameters[name].dtype)
    return found


def new_rows(
    embedding: Float[np.ndarray, "V1 D"],
    known: int,
    size: int,
    expansions: Sequence[Sequence[int]],
) -> Float[np.ndarray, "N D"]:
    """The `NEW_ROWS` with which a model reads text in a vocabulary of `size` ids, of which it knows
    the first `known`: each id beyond them as the mean of its expansion in the model's own table, in
    its dtype.

    expansions: of the last ids of the vocabulary, by ids that the model knows. Ids between these
    and the known ones, which no text has, get the mean of all rows."""
    first = size - len(expansions)
    whole = with_new_rows({"embedding": embedding[:known]}, first, mean_weights(expansions, first))
    return whole["embedding"][known:]


def resized(model: ModelConfig, size: int) -> ModelConfig:
    """The shape with another number of ids."""
    return replace(model, vocabulary_size=size)
