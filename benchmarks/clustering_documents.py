"""Clusters of documents beside their peers, and how time and memory grow.

    python benchmarks/clustering_documents.py --data DATA [--peer DIR]

DATA has <language>.jsonl.gz files. Their documents become subword ids by a tokenizer that is
trained here; what comes after is compared, each in a process of its own:

- vectors: TF-IDF and truncated SVD, ours and scikit-learn's TfidfTransformer, TruncatedSVD and
  Normalizer, fitted and applied to the same documents;
- clusters: balanced k-means on the same vectors, ours, scikit-learn's KMeans (which knows no
  balance) and, if DIR is a checkout of kernelmachine/balanced-kmeans, the one of X-ELM's authors;
- growth: our whole path on more and more documents, drawn anew from those there are.

Inertia is the mean squared distance of a document to the centre of its cluster; balance the largest
cluster over the mean. Rounds are interleaved, each with its own random seed; the median is shown,
and the spread.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from clustering import kmeans, tfidf
from clustering.documents import Documents
from clustering.files import read_arrays
from clustering.vectoriser import Vectoriser
from xelm.data import contents, reading, tokenizer, tokenizer_training, unusable

DIMENSIONS = 100
VOCABULARY = 8192
OURS, THEIRS, SCIKIT = "ours", "kernelmachine/balanced-kmeans", "scikit-learn"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", metavar="DIR")
    parser.add_argument("--peer", metavar="DIR")
    parser.add_argument("--documents", type=int, default=20_000, help="of the comparisons")
    parser.add_argument("--grow", default="1e4,3e4,1e5,3e5,1e6", help="documents of the growth")
    parser.add_argument("-k", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--random-seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, metavar=("JOB", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_one(options.one[0], Path(options.one[1]), options)))
        return
    if not options.data:
        parser.error("name the texts with --data")
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(options.data), Path(folder), options.documents, options.k)
        _compare(("vectors", "documents/s"), [OURS, SCIKIT], folder, options)
        peers = [OURS, SCIKIT, *([THEIRS] if options.peer else [])]
        _compare(("clusters", "seconds"), peers, folder, options)
        print("\n| documents | seconds | documents/s | peak memory |\n|---|---|---|---|")
        for count in (int(float(text)) for text in options.grow.split(",")):
            found = _apart(f"growth:{count}", folder, options)
            print(
                f"| {count:,} | {found['seconds']:.1f} | {count / found['seconds']:,.0f} "
                f"| {found['peak'] / 2**20:,.0f} MiB |",
                flush=True,
            )


def _prepare(data: Path, folder: Path, documents: int, k: int) -> None:
    """Ids of documents, as many of each language, in random order; and vectors of them."""
    tags = contents.languages_of(data)
    each = -(-documents // len(tags))
    texts = {
        tag: [d.text for d in islice(reading.read(data, unusable.UnusableRecords(), [tag]), each)]
        for tag in tags
    }
    tokenizer_training.train(texts, VOCABULARY, folder / "tokenizer")
    loaded = tokenizer.load(folder / "tokenizer")
    found = [np.array(ids, np.uint16) for tag in tags for ids in loaded.encode(texts[tag])]
    order = np.random.default_rng(0).permutation(len(found))[: len(found) // k * k]
    found = [found[i] for i in order]
    ends = np.cumsum([len(ids) for ids in found])
    np.savez(folder / "documents.npz", ids=np.concatenate(found), ends=ends)
    vectoriser = tfidf.fit(found, VOCABULARY, DIMENSIONS)
    np.savez(folder / "vectoriser.npz", idf=vectoriser.idf, projection=vectoriser.projection)
    vectors = vectoriser.transform(found)
    np.save(folder / "vectors.npy", vectors)
    mean = ends[-1] / len(found)
    print(f"{len(found):,} documents in {len(tags)} languages, {mean:,.0f} subwords each, k={k}")


def _compare(
    what: tuple[str, str], peers: list[str], folder: str, options: argparse.Namespace
) -> None:
    job, unit = what
    found: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    for random_seed in range(options.rounds):
        for peer in peers:
            found[peer].append(_apart(f"{job}:{peer}", folder, options, random_seed))
    print(f"\n| {job} | {unit} | against ours | peak memory | inertia | balance |")
    print("|---|---|---|---|---|---|")
    ours = np.array([run["seconds"] for run in found[OURS]])
    for peer, runs in found.items():
        seconds = np.array([run["seconds"] for run in runs])
        shown = seconds if unit == "seconds" else options.documents / seconds
        ratio = np.median(seconds / ours)
        quality = [_spread(runs, name) for name in ("inertia", "balance")]
        print(
            f"| {peer} | {np.median(shown):,.3g} ({shown.min():,.3g} to {shown.max():,.3g}) "
            f"| {ratio:.2f} times the time | {runs[0]['peak'] / 2**20:,.0f} MiB "
            f"| {quality[0]} | {quality[1]} |",
            flush=True,
        )


def _spread(runs: list[dict[str, float]], name: str) -> str:
    if name not in runs[0]:
        return ""
    values = np.array([run[name] for run in runs])
    return f"{np.median(values):.4f} ({values.min():.4f} to {values.max():.4f})"


def _apart(
    job: str, folder: str, options: argparse.Namespace, random_seed: int = 0
) -> dict[str, float]:
    """What a job says of itself in a process of its own."""
    command = [sys.executable, __file__, "--one", job, folder, "-k", str(options.k)]
    command += ["--random-seed", str(random_seed)]
    command += ["--peer", options.peer] if options.peer else []
    return json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]
    )


def _one(job: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    name, _, which = job.partition(":")
    if name == "growth":
        return _timed(lambda: _grown(folder, int(which), options.k))
    if name == "vectors":
        return _timed(lambda: _vectors(folder, which))
    vectors = np.load(folder / "vectors.npy")
    return _clusters(vectors, which, options)


def _timed(run: Callable[[], object]) -> dict[str, float]:
    started = time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - started, "peak": _peak()}


def _peak() -> float:
    """Peak memory of this process in bytes; on Linux not by `getrusage`, which counts the parent's
    too."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024.0 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _vectors(folder: Path, which: str) -> np.ndarray:
    documents = list(_documents(folder))
    if which == OURS:
        return tfidf.fit(documents, VOCABULARY, DIMENSIONS).transform(documents)
    from scipy import sparse
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer

    ids = np.concatenate(documents)
    ends = np.cumsum([0, *map(len, documents)])
    counts = sparse.csr_array(
        (np.ones(len(ids)), ids.astype(np.int32), ends), shape=(len(documents), VOCABULARY)
    )
    counts.sum_duplicates()
    pipeline = make_pipeline(TfidfTransformer(), TruncatedSVD(DIMENSIONS), Normalizer())
    return pipeline.fit_transform(counts)


def _clusters(vectors: np.ndarray, which: str, options: argparse.Namespace) -> dict[str, float]:
    labels = np.zeros(0, int)

    def run() -> None:
        nonlocal labels
        if which == OURS:
            labels = kmeans.fit(vectors, options.k, options.random_seed).labels
        elif which == SCIKIT:
            from sklearn.cluster import KMeans

            model = KMeans(options.k, random_state=options.random_seed)
            labels = model.fit_predict(vectors)
        else:
            labels = _theirs(vectors, options)

    if which == THEIRS:
        import torch  # noqa: F401  # which takes seconds to load

        sys.path.insert(0, options.peer)
        import kmeans_pytorch  # noqa: F401  # pyright: ignore[reportMissingImports]
    elif which == SCIKIT:
        import sklearn.cluster  # noqa: F401
    else:
        import scipy.optimize  # noqa: F401
    found = _timed(run)
    centres = np.stack([vectors[labels == c].mean(axis=0) for c in range(options.k)])
    inertia = float(((vectors - centres[labels]) ** 2).sum(axis=1).mean())
    sizes = np.bincount(labels, minlength=options.k)
    return found | {"inertia": inertia, "balance": float(sizes.max() / sizes.mean())}


def _theirs(vectors: np.ndarray, options: argparse.Namespace) -> np.ndarray:
    import torch
    from kmeans_pytorch import KMeans  # pyright: ignore[reportMissingImports]

    np.random.seed(options.random_seed)
    model = KMeans(n_clusters=options.k, device=torch.device("cpu"), balanced=True)
    return model.fit(torch.from_numpy(vectors), tqdm_flag=False, iter_limit=50).numpy()


def _grown(folder: Path, count: int, k: int) -> None:
    arrays = read_arrays(folder / "vectoriser.npz")
    vectoriser = Vectoriser(idf=arrays["idf"], projection=arrays["projection"])
    drawn = Documents([_Drawn(list(_documents(folder)), count)], sizes=[count])
    tfidf.cluster(drawn, vectoriser, k, sample=drawn.sample(10_000))


class _Drawn:
    """So many documents of one language, each drawn from those given; the same at each reading."""

    def __init__(self, documents: list[np.ndarray], count: int):
        self.documents, self.count = documents, count

    def __iter__(self) -> Iterator[tuple[np.ndarray, str]]:
        draw = np.random.default_rng(0)
        for _ in range(self.count):
            ids = self.documents[int(draw.integers(len(self.documents)))]
            yield ids[int(draw.integers(len(ids) // 2 + 1)) :], "en"


def _documents(folder: Path) -> Iterator[np.ndarray]:
    arrays = read_arrays(folder / "documents.npz")
    start = 0
    for end in arrays["ends"].tolist():
        yield arrays["ids"][start:end]
        start = end


if __name__ == "__main__":
    main()
