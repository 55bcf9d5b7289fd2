"""What clusters of documents have to do with languages, by the terms that documents are made of.

    python benchmarks/clustering_by_language.py --data DATA

DATA has <language>.jsonl.gz files. As many documents of each of the paper's 16 languages fall into
16 clusters, by three kinds of terms and otherwise alike (TF-IDF, SVD to 100 dimensions, balanced
k-means): words as the authors' pipeline has them (scikit-learn's TfidfVectorizer with its pattern
of words and its English stop list), n-grams of characters, and subwords of a tokenizer that is
trained on the same documents. For each language: how many of its documents fall into the cluster
that has most of them (together), and what share of their clusters is of that language (pure); NMI
and purity of all. Clusters are of the nearest centre, by which documents reach experts. Medians of
the random seeds 0, 1, 2.
"""

import argparse
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from systems import LANGUAGES

from clustering import kmeans, ngrams, tfidf
from clustering.languages import english_name
from xelm.data import reading, tokenizer, tokenizer_training, unusable

VOCABULARY = 16_384
WORDS = r"(?u)\b\w\w+\b"
"""The pattern of scikit-learn's TfidfVectorizer."""
RANDOM_SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", metavar="DIR", required=True)
    parser.add_argument("--documents", type=int, default=750, help="of each language")
    options = parser.parse_args()
    texts = {tag: _texts(options.data, tag, options.documents) for tag in LANGUAGES}
    flat = [text for tag in LANGUAGES for text in texts[tag]]
    truth = np.repeat(np.arange(len(LANGUAGES)), options.documents)
    kinds = {
        "words": lambda seed: _words(flat, seed),
        "characters": lambda seed: _vectors(list(ngrams.ids(flat)), ngrams.BUCKETS, seed),
        "subwords": _subwords(texts, flat),
    }
    found = {kind: _measured(make, truth) for kind, make in kinds.items()}
    print(f"{options.documents} documents of each language\n")
    print(f"| | {' | '.join(f'{kind}: together, pure' for kind in kinds)} |")
    print(f"|---|{'---|' * len(kinds)}")
    for row, tag in enumerate(LANGUAGES):
        cells = [f"{m[row, 0]:.2f}, {m[row, 1]:.2f}" for m, _ in found.values()]
        print(f"| {tag} {english_name(tag)} | {' | '.join(cells)} |")
    print(f"| purity | {' | '.join(f'{m[:, 1].mean():.3f}' for m, _ in found.values())} |")
    print(f"| NMI | {' | '.join(f'{nmi:.3f}' for _, nmi in found.values())} |")
    example = next(text for text in texts["hi"] if len(text) > 60)[:60]
    print(f"\nWords of a Hindi text by that pattern: {example!r}: {re.findall(WORDS, example)}")


def _texts(data: str, tag: str, count: int) -> list[str]:
    found = [d.text for d in islice(reading.read(data, unusable.UnusableRecords(), [tag]), count)]
    if len(found) < count:
        raise SystemExit(f"{data} has {len(found)} documents in {tag}; {count} are wanted")
    return found


def _words(texts: Sequence[str], random_seed: int) -> np.ndarray:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer

    pipeline = make_pipeline(
        TfidfVectorizer(token_pattern=WORDS, stop_words="english"),
        TruncatedSVD(100, random_state=random_seed),
        Normalizer(),
    )
    return pipeline.fit_transform(texts)


def _subwords(texts: dict[str, list[str]], flat: Sequence[str]) -> Callable[[int], np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_training.train(texts, VOCABULARY, Path(folder) / "tokenizer")
        loaded = tokenizer.load(Path(folder) / "tokenizer")
        ids = [np.array(found, np.int32) for found in loaded.encode(list(flat))]
    return lambda random_seed: _vectors(ids, VOCABULARY, random_seed)


def _vectors(documents: Sequence[np.ndarray], vocabulary: int, random_seed: int) -> np.ndarray:
    return tfidf.fit(documents, vocabulary, 100, random_seed).transform(documents)


def _measured(make: Callable[[int], np.ndarray], truth: np.ndarray) -> tuple[np.ndarray, float]:
    """[languages, (together, pure)] and NMI, medians over random seeds."""
    tables, nmi = zip(*_runs(make, truth))
    return np.median(tables, axis=0), float(np.median(nmi))


def _runs(
    make: Callable[[int], np.ndarray], truth: np.ndarray
) -> Iterator[tuple[np.ndarray, float]]:
    from sklearn.metrics import normalized_mutual_info_score

    for random_seed in RANDOM_SEEDS:
        vectors = make(random_seed).astype(np.float32)
        centres = kmeans.fit(vectors, len(LANGUAGES), random_seed).centres
        labels = kmeans.assign(vectors, centres)
        counts = np.zeros((len(LANGUAGES), len(LANGUAGES)), int)
        np.add.at(counts, (truth, labels), 1)
        shares = counts / counts.sum(axis=1, keepdims=True)
        of_cluster = counts / np.maximum(counts.sum(axis=0), 1)
        table = np.stack([shares.max(axis=1), (shares * of_cluster).sum(axis=1)], axis=1)
        yield table, float(normalized_mutual_info_score(truth, labels))


if __name__ == "__main__":
    main()
