"""What routers are worth in languages that no expert serves, and in those that experts do.

    python benchmarks/unserved.py RUN TEXT [--tokens 20000]

TEXT is a folder of <language>.jsonl or .jsonl.gz files, which the RUN has not seen. For each
language, bits per byte of whole documents: the seed, the dense baseline, the best single expert,
equal weights of all experts, the posterior that forgets, `detected` and `learned` as users get
them, and both without their mixture for text that is like none of the experts' (bare). Then the
models that a token asks, and the share of tokens at which learned mixes all models. Last, for the
languages that no expert serves, bits per token of the first 32 tokens of each document, where a
router has little to go by.
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np

from clustering.languages import canonical, lookup
from xelm import open_run
from xelm.inference.routers import MIXTURE
from xelm.inference.routing import mixture, states_along, weights_along
from xelm.inference.scoring import score_documents, targets
from xelm.models.checkpoint import read_config, read_for_inference
from xelm.runs.routers import Routing, make_router, serving
from xelm.runs.run import Run

COLUMNS = (
    *("seed", "dense", "best expert", "uniform", "posterior"),
    *("detected, bare", "detected", "learned, bare", "learned"),
)
LEAST_WEIGHT = 0.001
"""Below which an expert is not asked, as `Routing` has it."""
FIRST = 32
"""Tokens of the beginning of a document."""
BEGINNINGS = ("seed", "dense", "detected", "learned")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=20_000, help="of each language")
    options = parser.parse_args()
    run = open_run(options.run)
    experts = run.registry().published()
    served = serving(run.registry(), experts)
    routers = {
        name: make_router(run, experts, Routing(name=name))
        for name in ("uniform", "detected", "learned")
    }
    routers["posterior"] = make_router(run, experts, Routing(name="posterior", memory=0.8))
    for name in ("detected", "learned"):
        if (mixing := getattr(routers[name], "otherwise", None)) is not None:
            routers[f"{name}, bare"] = getattr(mixing, "router", mixing)
    tags, documents, sizes = _texts(run, Path(options.text), options.tokens)
    names, scores = _scores(run, documents)
    print(f"| language | {' | '.join(COLUMNS)} | asked, bare | asked | mixed |")
    print("|---|" + "---|" * (len(COLUMNS) + 3))
    for kind, wanted in (("served", True), ("not served", False)):
        rows = []
        for tag in sorted(set(tags)):
            if (lookup(tag, served) is not None) == wanted:
                some = [n for n, other in enumerate(tags) if other == tag]
                rows.append(_row(routers, names, documents, scores, sizes, some, len(experts)))
                _print(tag, rows[-1])
        if rows:
            _print(f"mean of {len(rows)} {kind}", np.mean(rows, axis=0))
        if not wanted:
            lost = sum(row[COLUMNS.index("learned")] > min(row[:2]) for row in rows)
            print(f"\nlearned is worse than the seed or dense in {lost} of {len(rows)} not served")
    unserved = [tag for tag in sorted(set(tags)) if lookup(tag, served) is None]
    if unserved:
        _print_beginnings(routers, names, tags, documents, scores, unserved)


def _texts(run: Run, folder: Path, most: int):
    """Language, ids and bytes of each document, up to so many tokens of each language."""
    tokenizer, tags, documents, sizes = run.tokenizer(), [], [], []
    for path in sorted(folder.glob("*.jsonl*")):
        opener, left = gzip.open if path.suffix == ".gz" else open, most
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"]
                ids = np.asarray(tokenizer.encode([text])[0], np.int64)
                tags.append(canonical(path.name.split(".")[0]))
                documents.append(ids)
                sizes.append(len(text.encode()))
                left -= len(ids)
                if left <= 0:
                    break
    return tags, documents, sizes


def _scores(run: Run, documents):
    """Names of the models, experts first, and log probabilities of each document's tokens, [models,
    tokens]."""
    tokenizer, model = run.tokenizer(), read_config(run.seed)
    systems = {e.name: e.directory(run.directory) for e in run.registry().published()}
    systems["seed"] = run.seed
    if run.dense.exists():
        systems["dense"] = run.dense
    found = [
        score_documents(
            model,
            read_for_inference(directory, model),
            documents,
            start_id=tokenizer.start_id,
            end_id=tokenizer.end_id,
            context_length=run.context_length,
            mask_id=tokenizer.mask_id,
        )
        for directory in systems.values()
    ]
    wanted = [targets(model, ids, tokenizer.end_id) for ids in documents]
    documents[:] = wanted
    return list(systems), [np.stack(rows).astype(float) for rows in zip(*found)]


def _row(routers, names, documents, scores, sizes, some, experts) -> list[float]:
    total = np.log(2) * sum(sizes[n] for n in some)
    alone = -sum(scores[n].sum(axis=1) for n in some) / total
    bits = {"seed": alone[names.index("seed")], "best expert": alone[:experts].min()}
    bits["dense"] = alone[names.index("dense")] if "dense" in names else np.nan
    asked, mixed, tokens = {}, 0, sum(len(documents[n]) for n in some)
    for name, router in routers.items():
        nats, count = 0.0, 0
        for n in some:
            own, everywhere = scores[n][: router.experts], np.arange(len(documents[n]))
            states = states_along(router, router.start(None), documents[n])
            weights = weights_along(router, states, own, everywhere, None, LEAST_WEIGHT)
            nats -= mixture(weights, own).sum()
            asks = router.asks(states[:-1])
            count += np.where(asks, router.experts, np.isfinite(weights).sum(axis=1)).sum()
            if name == "learned":
                mixed += router.decided_by(states[:-1]).count(MIXTURE)
        bits[name], asked[name] = nats / total, count / tokens
    shares = [asked["learned, bare"], asked["learned"], mixed / tokens]
    return [bits[name] for name in COLUMNS] + shares


def _print_beginnings(routers, names, tags, documents, scores, unserved) -> None:
    """Bits per token of the first tokens of each document, by language."""
    print(f"\n| first {FIRST} tokens, bits per token | {' | '.join(BEGINNINGS)} |")
    print("|---|" + "---|" * len(BEGINNINGS))
    rows = []
    for tag in unserved:
        some = [n for n, other in enumerate(tags) if other == tag]
        bits = dict.fromkeys(BEGINNINGS, 0.0)
        for n in some:
            for model in ("seed", "dense"):
                found = scores[n][names.index(model)] if model in names else np.full(1, np.nan)
                bits[model] -= found[:FIRST].sum()
            for name in BEGINNINGS[2:]:
                ids, own = documents[n][:FIRST], scores[n][: routers[name].experts, :FIRST]
                states = states_along(routers[name], routers[name].start(None), ids)
                weights = weights_along(
                    routers[name], states, own, np.arange(len(ids)), None, LEAST_WEIGHT
                )
                bits[name] -= mixture(weights, own).sum()
        total = np.log(2) * sum(len(documents[n][:FIRST]) for n in some)
        rows.append([bits[name] / total for name in BEGINNINGS])
        print(f"| {tag} | " + " | ".join(f"{value:.3f}" for value in rows[-1]) + " |", flush=True)
    means = " | ".join(f"{value:.3f}" for value in np.mean(rows, axis=0))
    print(f"| mean of {len(rows)} not served | {means} |")
    for column, model in enumerate(BEGINNINGS[:2]):
        worse = [tag for tag, row in zip(unserved, rows) if row[-1] > row[column]]
        print(f"\nlearned is worse than {model} there in {len(worse)} ({', '.join(worse)})")


def _print(label, row) -> None:
    bits = " | ".join(f"{value:.3f}" for value in row[:-3])
    print(f"| {label} | {bits} | {row[-3]:.1f} | {row[-2]:.1f} | {row[-1]:.0%} |", flush=True)


if __name__ == "__main__":
    main()
