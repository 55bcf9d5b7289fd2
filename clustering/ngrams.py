"""Clusters of documents by character n-grams, which need no tokenizer.

N-grams are hashed into ids, the terms of `tfidf`, so that there is no vocabulary and any script
works. Experts are trained on clusters over a seed's subwords instead.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Integer

from clustering import tfidf
from clustering.clustering import Clustering
from clustering.documents import Documents

LONGEST = 3
"""Length in characters of the longest n-gram."""
BUCKETS = 1 << 16
"""Number of ids; n-grams in one bucket count as one term."""
SAMPLE_SIZE = 20_000
"""Number of documents in memory at once, at some twelve bytes a character."""
_TEXTS_AT_ONCE = 256


def ids(texts: Iterable[str]) -> Iterator[Integer[np.ndarray, " ngrams"]]:
    """Ids of the n-grams of each text, in no order: 1 to `LONGEST` characters in lower case, within
    words with a space at either end, as in scikit-learn's HashingVectorizer."""
    from scipy import sparse
    from sklearn.feature_extraction.text import HashingVectorizer

    options: dict[str, Any] = {"alternate_sign": False, "norm": None, "dtype": np.float32}
    hashing = HashingVectorizer(
        analyzer="char_wb", ngram_range=(1, LONGEST), n_features=BUCKETS, **options
    )
    remaining = iter(texts)
    while batch := list(islice(remaining, _TEXTS_AT_ONCE)):
        counts = sparse.csr_array(hashing.transform(batch))
        terms = np.repeat(counts.indices.astype(np.int32), counts.data.astype(np.int64))
        ends = np.cumsum(counts.sum(axis=1).astype(np.int64))
        # Copies: a view of one text's ids would keep those of the batch in memory.
        yield from (part.copy() for part in np.split(terms, ends[:-1]))


def cluster(
    texts: Documents, k: int, random_seed: int = 0, *, made_from: dict[str, str] | None = None
) -> Clustering:
    """k clusters of documents that are texts, by TF-IDF over character n-grams; see
    `tfidf.cluster`.

    `clustering.assign(ids([text]))` finds the cluster of another text. Errors as in `tfidf.fit` and
    `tfidf.cluster`."""
    documents = replace(texts, terms=ids)
    sample = documents.sample(SAMPLE_SIZE, random_seed)
    vectoriser = tfidf.fit(sample, BUCKETS, random_seed=random_seed)
    found = tfidf.cluster(documents, vectoriser, k, random_seed, sample=sample, made_from=made_from)
    terms = {"terms": "characters", "longest": LONGEST, "buckets": BUCKETS}
    return replace(found, parameters=found.parameters | terms)
