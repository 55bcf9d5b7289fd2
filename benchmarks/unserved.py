"""Bits per byte of routers in languages that no expert serves, and in those that experts serve.

    python benchmarks/unserved.py RUN TEXT [--tokens 20000] [--cross-validate]

TEXT is a folder of <language>.jsonl or .jsonl.gz files, which the RUN has not seen. For each
language, bits per byte of whole documents: the seed, the dense baseline, the best single expert,
equal weights of all experts, the posterior that forgets, `detected` and `learned` as users get
them, and both without their mixture for text that is like none of the experts' (bare). Then the
number of models that are run at a token, and the share of tokens at which learned mixes all models.
Last, for the languages that no expert serves, bits per token of the first 32 tokens of each
document, where a router has little to go by.

With --cross-validate, instead: how the shares of served text that may count as unknown
(`clustering.novelty`) would be chosen on half of the languages that no expert serves and half of
the documents of the others, and what is chosen is worth on the other halves; both ways, beside what
is shipped. Chosen is what loses to the seed or dense in the fewest unserved languages, whole
documents and beginnings, and of those what runs the fewest models on served text.
"""

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clustering import novelty
from clustering.languages import canonical, lookup
from experts.expert import Expert
from xelm.api import Run, open_run
from xelm.inference.route import Router, Walk, log_likelihoods_along, mixture, states_along
from xelm.inference.routers import MIXTURE, ByLanguage, OrMixture
from xelm.inference.routing import Routing, RoutingLimits
from xelm.inference.scoring import score_documents, targets
from xelm.models.checkpoint import read_config, read_for_inference
from xelm.runs.fit import documents_to_fit, pieces
from xelm.runs.make_router import make_router, serving
from xelm.runs.shares import all_languages

COLUMNS = (
    *("seed", "dense", "best expert", "uniform", "posterior"),
    *("detected, bare", "detected", "learned, bare", "learned"),
)
LIMITS = RoutingLimits(least_weight=0.001)
"""Weight below which an expert does not run, as in `Routing`."""
FIRST = 32
"""Tokens of the beginning of a document."""
BEGINNINGS = ("seed", "dense", "detected", "learned")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=20_000, help="of each language")
    parser.add_argument("--cross-validate", action="store_true", help="choose on halves")
    options = parser.parse_args()
    run = open_run(options.run)
    experts = run.registry().published()
    served = serving(experts)
    routers: dict[str, Router] = {
        "uniform": make_router(run, experts, Routing(name="uniform")),
        "posterior": make_router(run, experts, Routing(name="posterior", memory=0.8)),
    }
    for name in ("detected", "learned"):
        mixing = or_mixture(run, experts, name)
        routers |= {name: mixing, f"{name}, bare": mixing.router}
    texts = documents_in(run, Path(options.text), options.tokens)
    tags = [tag for tag, some in texts.items() for _ in some]
    flat = [text for some in texts.values() for text in some]
    sizes = [len(text.encode()) for text in flat]
    ids = [np.asarray(some, np.int64) for some in run.tokenizer().encode(flat)]
    names, documents, scores = scores_of(run, ids)
    if options.cross_validate:
        return _cross_validate(
            run, or_mixture(run, experts, "learned"), names, tags, documents, scores, sizes
        )
    print(f"| language | {' | '.join(COLUMNS)} | models, bare | models | mixed |")
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


def documents_in(run: Run, folder: Path, most: int) -> dict[str, list[str]]:
    """Documents of each language in a folder, as many as have so many tokens."""
    tokenizer, found = run.tokenizer(), {}
    for path in sorted(folder.glob("*.jsonl*")):
        opener, left = gzip.open if path.suffix == ".gz" else open, most
        texts = found.setdefault(canonical(path.name.split(".")[0]), [])
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                texts.append(json.loads(line)["text"])
                left -= len(tokenizer.encode(texts[-1:])[0])
                if left <= 0:
                    break
    return found


def or_mixture(run: Run, experts: Sequence[Expert], routing: str) -> OrMixture:
    """The router of a routing for text without a given language, which mixes all models where no
    expert fits. SystemExit if the RUN serves too few languages to know such text."""
    router = make_router(run, experts, Routing(name=routing))
    if not (isinstance(router, ByLanguage) and isinstance(router.otherwise, OrMixture)):
        raise SystemExit(f"{run.directory} serves too few languages to know others")
    return router.otherwise


def scores_of(
    run: Run, documents: list[np.ndarray]
) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
    """Names of the models, experts first, then the seed and the dense baseline, if there is one;
    the tokens of each document with its end; and their log probabilities, [models, tokens]."""
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
            text_format=tokenizer.text_format,
            context_length=run.context_length(),
        )
        for directory in systems.values()
    ]
    wanted = [targets(model, ids, tokenizer.text_format) for ids in documents]
    return list(systems), wanted, [np.stack(rows).astype(float) for rows in zip(*found)]


def _row(routers, names, documents, scores, sizes, some, experts) -> list[float]:
    total = np.log(2) * sum(sizes[n] for n in some)
    alone = -sum(scores[n].sum(axis=1) for n in some) / total
    bits = {"seed": alone[names.index("seed")], "best expert": alone[:experts].min()}
    bits["dense"] = alone[names.index("dense")] if "dense" in names else np.nan
    models_read, mixed, tokens = {}, 0, sum(len(documents[n]) for n in some)
    for name, router in routers.items():
        nats, count = 0.0, 0
        for n in some:
            own = scores[n][: router.experts]
            weights, by, needed = Walk(router, None, documents[n]).decide(own, LIMITS)
            nats -= mixture(weights, own).sum()
            count += np.where(needed, router.experts, np.isfinite(weights).sum(axis=1)).sum()
            if name == "learned":
                mixed += by.count(MIXTURE)
        bits[name], models_read[name] = nats / total, count / tokens
    shares = [models_read["learned, bare"], models_read["learned"], mixed / tokens]
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
                found = Walk(routers[name], None, ids).decide(own, LIMITS)
                bits[name] -= mixture(found.log_weights, own).sum()
        total = np.log(2) * sum(len(documents[n][:FIRST]) for n in some)
        rows.append([bits[name] / total for name in BEGINNINGS])
        print(f"| {tag} | " + " | ".join(f"{value:.3f}" for value in rows[-1]) + " |", flush=True)
    means = " | ".join(f"{value:.3f}" for value in np.mean(rows, axis=0))
    print(f"| mean of {len(rows)} not served | {means} |")
    for column, model in enumerate(BEGINNINGS[:2]):
        worse = [tag for tag, row in zip(unserved, rows) if row[-1] > row[column]]
        print(f"\nlearned is worse than {model} there in {len(worse)} ({', '.join(worse)})")


class Candidate(NamedTuple):
    """Settings of the novelty, and what they do to each document."""

    short: int
    most_false: tuple[float, float]
    outside: list[np.ndarray]
    """Whether each token is mixed."""


class Measured(NamedTuple):
    """What a candidate is worth on some documents."""

    lost: int
    """Unserved languages in which it is worse than the seed or dense, whole or at the beginning."""
    models_read: float
    """Models a token of served text."""
    served: float
    unserved: float
    first: float
    """Bits a byte of both, as means of languages, and a token of unserved beginnings."""


def _held_out_beginnings(run: Run, found: novelty.Novelty) -> np.ndarray:
    """Sums of beginnings of held-out texts in the languages that `found` knows, from which its
    thresholds are made, [N, size]."""
    known, texts = (
        [found.identifier.languages[n] for n in found.columns],
        run.texts(all_languages(run)),
    )
    held_out = {t: documents_to_fit(run, texts[t], held_out=True) for t in known}
    return novelty.beginnings(found, pieces(run), held_out)[0]


def _cross_validate(run, mixing, names, tags, documents, scores, sizes) -> None:
    inner = mixing.router
    served = serving(run.registry().published())
    alone, mixed, models_read, sums = [], [], [], []
    for ids, found in zip(documents, scores):
        own = found[: inner.experts]
        weights = Walk(inner, None, ids).decide(own, LIMITS).log_weights
        alone.append(mixture(weights, own))
        models_read.append(np.isfinite(weights).sum(axis=1))
        evidence = log_likelihoods_along(mixing.mixture, found)[:-1]
        nothing = np.zeros((len(ids), 0))
        mixed.append(mixture(mixing.mixture.log_weights(nothing, evidence), found))
        states = states_along(mixing, mixing.start(None), ids)[:-1]
        sums.append(states[:, 1 : 1 + mixing.novelty.size])

    known = _held_out_beginnings(run, mixing.novelty)

    def candidate(short: int, most_false: tuple[float, float]) -> Candidate:
        found = mixing.novelty.with_thresholds(known, short, most_false)
        return Candidate(short, most_false, [found.outside(some) for some in sums])

    def measured(found: Candidate, numbers: list[int]) -> Measured:
        bits: dict[str, list[list[float]]] = {"served": [], "unserved": []}
        lost, count, tokens = 0, 0, 0
        for tag in sorted({tags[n] for n in numbers}):
            some = [n for n in numbers if tags[n] == tag]
            nats = [-np.where(found.outside[n], mixed[n], alone[n]) for n in some]
            size = np.log(2) * sum(sizes[n] for n in some)
            first = np.log(2) * sum(len(documents[n][:FIRST]) for n in some)
            own = [sum(x.sum() for x in nats) / size, sum(x[:FIRST].sum() for x in nats) / first]
            is_served = lookup(tag, served) is not None
            bits["served" if is_served else "unserved"].append(own)
            if is_served:
                count += sum(
                    np.where(found.outside[n], len(names), models_read[n]).sum() for n in some
                )
                tokens += sum(len(documents[n]) for n in some)
            else:
                rest = [[-scores[n][m] for n in some] for m in range(inner.experts, len(names))]
                lost += any(
                    sum(x.sum() for x in other) / size < own[0]
                    or sum(x[:FIRST].sum() for x in other) / first < own[1]
                    for other in rest
                )
        means = [np.mean(bits[kind], axis=0) for kind in ("served", "unserved")]
        return Measured(lost, count / tokens, means[0][0], means[1][0], means[1][1])

    grid = [candidate(0, (share, share)) for share in (0.005, 0.01, 0.02, 0.05, 0.1)]
    for short in (16, 32, 64):
        for first in (0.1, 0.2, 0.3, 0.4, 0.6):
            grid += [candidate(short, (first, share)) for share in (0.005, 0.01, 0.02, 0.05)]
    shipped = candidate(novelty.SHORT, novelty.MOST_FALSE)
    unserved = [tag for tag in sorted(set(tags)) if lookup(tag, served) is None]
    if len(unserved) < 2:
        raise SystemExit(f"two languages that no expert serves are needed; got {unserved}")
    halves: list[list[int]] = [[], []]
    for number, tag in enumerate(tags):
        halves[(unserved.index(tag) if tag in unserved else number) % 2].append(number)
    print(
        "| chosen on | short | shares | measured on | lost | models | served | unserved | first |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for one, other in ((0, 1), (1, 0)):
        best = min(grid, key=lambda found: measured(found, halves[one])[:2])
        for label, found in ((f"half {one + 1}", best), ("shipped", shipped)):
            for place in (one, other):
                _print_measured(label, found, f"half {place + 1}", measured(found, halves[place]))


def _print_measured(label: str, found: Candidate, half: str, values: Measured) -> None:
    shares = ", ".join(f"{share:.1%}" for share in found.most_false)
    bits = " | ".join(f"{value:.3f}" for value in values[2:])
    print(
        f"| {label} | {found.short} | {shares} | {half} | {values.lost} | "
        f"{values.models_read:.2f} | {bits} |",
        flush=True,
    )


def _print(label, row) -> None:
    bits = " | ".join(f"{value:.3f}" for value in row[:-3])
    print(f"| {label} | {bits} | {row[-3]:.1f} | {row[-2]:.1f} | {row[-1]:.0%} |", flush=True)


if __name__ == "__main__":
    main()
