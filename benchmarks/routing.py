"""What routers and abstaining are worth on text that is hard to route, by a trained RUN.

    python benchmarks/routing.py RUN TEXT [--documents 20] [--naive 2048]

TEXT is a folder of <language>.jsonl or .jsonl.gz files, which the RUN has not seen. Four kinds of
text are made of it: the beginnings of documents in the languages that experts serve; their first
three words; the beginnings of two documents in two of these languages, one after the other, four
words of each in turn; and beginnings in languages that no expert serves. For each router, alone and
abstaining below some thresholds: bits per byte, and the share of tokens at which it abstained.
Costs: models that run at a token. "best expert" is the best one of each text, as no router knows.

Then what a step of a batch costs under the default router: of eight texts in one language, whose
experts are known since the language is given, and of eight in as many languages; and what it costs
where one text is replaced by one in a language that no expert serves, for which all models run.
Median of steps, which take turns; times over the batch without that text.

Last, the cost of routing itself: weights of all positions of a text from one cumulative sum, beside
the naive way, in which the vector of each prefix is made anew (as in the authors' code).
"""

import argparse
import gzip
import json
import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from clustering.languages import canonical
from xelm.api import Run, open_run
from xelm.inference.engine import Engine
from xelm.inference.ensemble import Ensemble
from xelm.inference.route import Walk, mixture, states_along
from xelm.inference.routers import ByLanguage
from xelm.inference.routing import Routing
from xelm.inference.running import GenerationRequest
from xelm.inference.sampling_params import SamplingParams
from xelm.inference.scoring import score_documents
from xelm.models.checkpoint import read_config, read_for_inference
from xelm.runs.make_router import make_router, models_behind

WORDS = 30
KINDS = ("served", "three words", "switched", "not served")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--documents", type=int, default=20, help="of each language")
    parser.add_argument("--naive", type=int, default=2048, help="tokens of the longest text")
    options = parser.parse_args()
    run = open_run(options.run)
    texts = _texts(run, Path(options.text), options.documents)
    ids, scores, names = _scores(run, texts)
    for kind in KINDS:
        print(f"{kind}: {len(texts[kind])} texts, {sum(map(len, ids[kind]))} tokens")
    print(f"\n| routing | models | {' | '.join(KINDS)} |\n|---|---|{'---|' * len(KINDS)}")
    for name in ("seed", "dense"):
        if name in names:
            _print(name, 1, [_bits(texts[k], _alone(scores[k], names.index(name))) for k in KINDS])
    experts = [n for n in range(len(names)) if names[n] not in ("seed", "dense")]
    best = [[-max(s[experts].sum(axis=1)) for s in scores[kind]] for kind in KINDS]
    _print("best expert", 1, [_bits(texts[k], found) for k, found in zip(KINDS, best)])
    for routing in _routings(names):
        _route(run, routing, texts, ids, scores, names)
    _batches(run, texts)
    _naive(run, options.naive)


def _routings(names: list[str]) -> Iterator[Routing]:
    for name in ("detected", "learned", "tfidf", "posterior", "uniform"):
        yield Routing(name=name, least_weight=0.0)
        yield Routing(name=name)
        yield Routing(name=name, top_m=1)
        if name == "posterior":
            yield from (Routing(name=name, memory=memory) for memory in (0.95, 0.9, 0.8))
        if name in ("detected", "learned", "tfidf"):
            for threshold in (0.5, 0.8, 0.95):
                yield Routing(name=name, abstain=threshold)
                if "dense" in names:
                    yield Routing(name=name, abstain=threshold, abstain_to="dense")
                    yield Routing(name=name, top_m=1, abstain=threshold, abstain_to="dense")


def _texts(run: Run, folder: Path, count: int) -> dict[str, list[str]]:
    served = {tag for expert in run.registry().published() for tag in expert.languages}
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    begins: dict[str, list[list[str]]] = {}
    for path in sorted(folder.glob("*.jsonl*")):
        tag = canonical(path.name.split(".")[0])
        # Chinese and Japanese have no spaces: two characters stand for a word there.
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            documents = [json.loads(line)["text"] for _, line in zip(range(count), file)]
        words = [_words(tag, text)[:WORDS] for text in documents]
        kind = "served" if tag in served else "not served"
        found[kind] += [_joined(tag, some) for some in words]
        if tag in served:
            begins[tag] = words
            found["three words"] += [_joined(tag, some[:3]) for some in words]
    tags = list(begins)
    for place, tag in enumerate(tags):
        other = tags[(place + len(tags) // 2) % len(tags)]
        for one, two in zip(begins[tag], begins[other]):
            parts = []
            for first in range(0, WORDS, 4):
                parts += [_joined(tag, one[first : first + 4])]
                parts += [_joined(other, two[first : first + 4])]
            found["switched"].append(" ".join(part for part in parts if part))
    return found


def _words(tag: str, text: str) -> list[str]:
    if tag in ("zh", "ja"):
        return [text[n : n + 2] for n in range(0, len(text), 2)]
    return text.split()


def _joined(tag: str, words: list[str]) -> str:
    return ("" if tag in ("zh", "ja") else " ").join(words)


def _scores(run: Run, texts: dict[str, list[str]]):
    """Ids of each text, log probabilities of each token by each model, and names of the models."""
    tokenizer, model = run.tokenizer(), read_config(run.seed)
    experts = run.registry().published()
    systems = {expert.name: expert.directory(run.directory) for expert in experts}
    systems["seed"] = run.seed
    if run.dense.exists():
        systems["dense"] = run.dense
    encoded = {kind: tokenizer.encode(texts[kind]) for kind in KINDS}
    ids = {kind: [np.asarray(x, np.int64) for x in encoded[kind]] for kind in KINDS}
    by_system = []
    for directory in systems.values():
        found = iter(
            score_documents(
                model,
                read_for_inference(directory, model),
                [document for kind in KINDS for document in ids[kind]],
                text_format=tokenizer.text_format,
                context_length=run.context_length(),
            )
        )
        # Without the end, which these texts do not have.
        by_system.append({kind: [next(found)[:-1] for _ in ids[kind]] for kind in KINDS})
    scores = {
        kind: [np.stack(rows) for rows in zip(*(system[kind] for system in by_system))]
        for kind in KINDS
    }
    return ids, scores, list(systems)


def _alone(scores: list[np.ndarray], system: int) -> list[float]:
    return [-found[system].sum() for found in scores]


def _bits(texts: list[str], nats: list[float]) -> float:
    return sum(nats) / np.log(2) / sum(len(text.encode()) for text in texts)


def _route(run, routing, texts, ids, scores, names) -> None:
    experts = run.registry().published()
    router = make_router(run, experts, routing)
    columns = list(range(len(experts)))
    if router.experts > len(experts):
        columns += [names.index(name) for name in models_behind(run, routing)]
    cells, models_read = [], []
    for kind in KINDS:
        nats, unsure = [], []
        for document, found in zip(ids[kind], scores[kind]):
            own = found[columns]
            weights, _, needed = Walk(router, None, document).decide(own, routing)
            nats.append(-mixture(weights, own).sum())
            active = np.where(needed, router.experts, np.isfinite(weights).sum(axis=1))
            models_read += active.tolist()
            if routing.abstain is not None:
                unsure += (needed | (weights[:, -1] == 0) & (len(columns) > len(experts))).tolist()
        share = f" ({np.mean(unsure):.0%})" if unsure else ""
        cells.append((_bits(texts[kind], nats), share))
    label = routing.name + (f", top {routing.top_m}" if routing.top_m else "")
    label += "" if routing.least_weight else ", all weights"
    label += "" if routing.memory is None else f", memory {routing.memory}"
    if routing.abstain is not None:
        label += f", below {routing.abstain} {routing.abstain_to}"
    _print(label, np.mean(models_read), [cell[0] for cell in cells], [cell[1] for cell in cells])


def _print(label, models_read, bits, shares=()) -> None:
    cells = (f"{value:.3f}{share}" for value, share in zip_longest(bits, shares, fillvalue=""))
    print(f"| {label} | {models_read:.1f} | {' | '.join(cells)} |", flush=True)


def _batches(run: Run, texts: dict[str, list[str]], rows: int = 8, steps: int = 48) -> None:
    ensemble = run.ensemble()
    served = sorted({tag for expert in run.registry().published() for tag in expert.languages})
    count = len(texts["served"]) // len(served)
    one = [(served[1], text) for text in texts["served"][count : 2 * count]]
    several = [(tag, texts["served"][n * count]) for n, tag in enumerate(served)]
    print("\n| batch | models a step | ms a step | times |\n|---|---|---|---|")
    for label, some in (("one language", one), ("several languages", several)):
        batch = (some * rows)[:rows]
        stranger = [*batch[:-1], (None, texts["not served"][-1])]
        engines = [_engine(ensemble, given, steps) for given in (batch, stranger)]
        times: list[list[float]] = [[], []]
        models_read: list[list[int]] = [[], []]
        for number in range(steps):
            for place, engine in enumerate(engines):
                begun = time.perf_counter()
                found = engine.step()
                if number:  # the first reads the prompts
                    times[place].append(time.perf_counter() - begun)
                    weights = np.stack([weights for *_, weights in found])
                    models_read[place].append(int((weights > 0).any(axis=0).sum()))
        ratio = np.median(np.divide(times[1], times[0]))
        for place, name in enumerate((label, f"{label}, one text not served")):
            cells = f"{np.mean(models_read[place]):.1f} | {1e3 * np.median(times[place]):.1f}"
            print(f"| {name} | {cells} | {ratio if place else 1:.1f} |", flush=True)


def _engine(ensemble: Ensemble, batch: Sequence[tuple[str | None, str]], steps: int) -> Engine:
    """Texts that are to be continued, greedily, in languages that are given or not."""
    engine = Engine(ensemble)
    engine.reserve(len(batch))
    for number, (language, text) in enumerate(batch):
        ids = ensemble.tokenizer.begin(text)[: ensemble.model.max_length - steps]
        sampling = SamplingParams(max_new_tokens=steps, temperature=0.0)
        engine.add(GenerationRequest(ids=ids, sampling=sampling, language=language, number=number))
    return engine


def _naive(run: Run, longest: int) -> None:
    router = make_router(run, run.registry().published(), Routing(name="tfidf"))
    assert isinstance(router, ByLanguage) and router.otherwise is not None
    router = router.otherwise
    vectoriser = run.vectoriser()
    draw = np.random.default_rng(0)
    print("\n| tokens | one cumulative sum, ms | each prefix anew, ms | times |\n|---|---|---|---|")
    length = 128
    while length <= longest:
        ids = draw.integers(4, vectoriser.vocabulary_size, length)
        begun = time.perf_counter()
        states = states_along(router, router.start(None), ids)[:-1]
        quick = router.log_weights(states, np.zeros((length, 0)))
        middle = time.perf_counter()
        rows = [vectoriser.terms(ids[:t]).sum(axis=0) for t in range(length)]
        slow = router.log_weights(np.stack(rows), np.zeros((length, 0)))
        end = time.perf_counter()
        assert np.abs(np.exp(quick) - np.exp(slow)).max() < 1e-6
        one, other = 1e3 * (middle - begun), 1e3 * (end - middle)
        print(f"| {length} | {one:.1f} | {other:.1f} | {other / one:.0f} |", flush=True)
        length *= 2


if __name__ == "__main__":
    main()
