"""`xelm evaluate`: perplexity and bits per byte by language, for every system of a RUN.

Each model scores every document once; all routings are computed from those scores.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clustering.errors import UserError
from clustering.files import read_json, sha256, write_json
from experts.lock import locked
from xelm import __version__
from xelm.data.store import LanguageIds, Store
from xelm.inference.routing import Router, mixture, states_along, weights_along
from xelm.inference.scoring import score_documents, targets
from xelm.models.checkpoint import read_config, read_for_inference
from xelm.models.config import ModelConfig
from xelm.progress import bar
from xelm.runs.ensembles import check_top_m
from xelm.runs.init import tokenise
from xelm.runs.results import RESULTS, Row
from xelm.runs.routers import Routing, make_router, serving
from xelm.runs.run import Run

EVALUATED: Sequence[str] = ("language", "detected", "tfidf", "learned", "posterior")
"""Routings, unless others are asked for."""


def evaluate(
    run: Run,
    corpus: str | Path,
    *,
    routings: Sequence[str] = EVALUATED,
    top_m: int | None = None,
    least_weight: float = 0.001,
    temperature: float | None = None,
    max_documents: int | None = None,
    save: bool = True,
) -> list[Row]:
    """Scores the seed, the dense baseline if there is one, every published expert, and their
    ensemble under each routing; writes RUN/results/results.json, and keeps one of other text or
    options under another name. Where routing by language is the only one, each expert is scored on
    the languages it serves alone, at the cost of one model.

    max_documents: of each language, the first in the corpus; None takes all.
    """
    if "fixed" in routings:
        raise UserError(
            f"evaluate knows the routings {', '.join(EVALUATED)} and uniform; got fixed"
        )
    warmth = {"tfidf": temperature}
    chosen = [
        Routing(name=name, least_weight=least_weight, temperature=warmth.get(name))
        for name in routings
    ]
    if max_documents is not None and max_documents < 1:
        raise UserError(f"max_documents must be at least 1; got {max_documents}")
    experts = run.registry().published()
    if experts:
        check_top_m(top_m, len(experts))
        if temperature is not None and "tfidf" not in routings:
            raise UserError(
                "a router's temperature goes with routing tfidf, which is not asked for"
            )
    name = "evaluation-" + hashlib.sha256(str(corpus).encode()).hexdigest()[:8]
    store = tokenise(run, corpus, name)
    systems = {"seed": run.seed}
    if run.dense.exists():
        systems["dense"] = run.dense
    systems |= {expert.name: expert.directory(run.directory) for expert in experts}
    served, end_id = serving(run.registry(), experts), run.tokenizer().end_id
    model = read_config(run.seed)
    if not served:  # by clusters of documents
        chosen = [routing for routing in chosen if routing.name != "detected"]
    routers = {r.name: make_router(run, experts, r) for r in chosen} if experts else {}
    asked = {system: list(store.languages) for system in systems}
    if set(routings) == {"language"}:
        for index, expert in enumerate(experts):
            asked[expert.name] = [tag for tag in store.languages if served.get(tag) == index]
    scores = _score_all(run, systems, asked, store, max_documents)
    rows = [
        _row(system, None, store.languages[tag], found)
        for system in systems
        for tag, found in scores[system].items()
    ]
    for routing, router in routers.items():
        for tag, ids in store.languages.items():
            if routing == "language" and tag not in served:
                continue
            by_expert = [scores[expert.name].get(tag) for expert in experts]
            told = tag if routing == "language" else None
            mixed = _mix(router, told, ids, by_expert, model, end_id, (top_m, least_weight))
            rows.append(_row("ensemble", routing, ids, mixed))
    if save:
        options = {
            "corpus_sha256": store.record["corpus_sha256"],
            "routings": list(routings),
            "top_m": top_m,
            "least_weight": least_weight,
            "temperature": temperature,
            "max_documents": max_documents,
        }
        _save(run, str(corpus), options, rows)
    return rows


def _save(run: Run, corpus: str, options: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Writes results.json; one of other text or other options is kept under another name."""
    path = run.results / RESULTS
    with locked(run.directory, "evaluate", wait_seconds=60.0):
        if path.exists():
            try:
                before = read_json(path)
            except UserError:  # damaged, and none of our business
                before = {}
            if any(before.get(name) != value for name, value in options.items()):
                kept = path.with_name(f"results-{sha256(path)[:8]}.json")
                path.rename(kept)
                print(f"results of other text or options are kept in {kept}", file=sys.stderr)
        write_json(
            path,
            {
                "format": 1,
                "xelm": __version__,
                "corpus": corpus,
                **options,
                "rows": [row.to_json() for row in rows],
            },
        )


def _score_all(
    run: Run,
    systems: Mapping[str, Path],
    asked: Mapping[str, Sequence[str]],
    store: Store,
    max_documents: int | None,
) -> dict[str, dict[str, list[np.ndarray]]]:
    """system -> each language it is asked in -> log probabilities of each document's tokens. One
    model at a time is in memory."""
    model, tokenizer = read_config(run.seed), run.tokenizer()
    documents = {
        tag: [ids.document(n) for n in range(min(len(ids), max_documents or len(ids)))]
        for tag, ids in store.languages.items()
    }
    sizes = {tag: sum(len(ids) + 1 for ids in found) for tag, found in documents.items()}
    total = sum(sizes[tag] for tags in asked.values() for tag in tags)
    scores: dict[str, dict[str, list[np.ndarray]]] = {}
    with bar(total, "evaluate", "tok") as progress:
        for system, directory in systems.items():
            parameters = jax.device_put(read_for_inference(directory, model))
            flat = [ids for tag in asked[system] for ids in documents[tag]]
            found = iter(
                score_documents(
                    model,
                    parameters,
                    flat,
                    start_id=tokenizer.start_id,
                    end_id=tokenizer.end_id,
                    sequence_length=run.config.experts.sequence_length,
                    mask_id=tokenizer.mask_id,
                    progress=progress.update,
                )
            )
            scores[system] = {tag: [next(found) for _ in documents[tag]] for tag in asked[system]}
    return scores


def _mix(
    router: Router,
    told: str | None,
    ids: LanguageIds,
    by_expert: list[list[np.ndarray] | None],
    model: ModelConfig,
    end_id: int,
    kept: tuple[int | None, float],
) -> list[np.ndarray]:
    """Log probabilities of the mixture for each document, of which the router is `told` the
    language or not. Experts that were not asked have None, and no weight."""
    mixed = []
    for number in range(max(len(found) for found in by_expert if found is not None)):
        wanted = targets(model, np.asarray(ids.document(number), np.int64), end_id)
        silent = np.full(len(wanted), -np.inf, np.float32)
        scores = np.stack([silent if found is None else found[number] for found in by_expert])
        states = states_along(router, router.start(told), wanted)
        everywhere = np.arange(len(wanted))
        mixed.append(mixture(weights_along(router, states, scores, everywhere, *kept), scores))
    return mixed


def _row(system: str, routing: str | None, ids: LanguageIds, scores: list[np.ndarray]) -> Row:
    return Row(
        system=system,
        routing=routing,
        language=ids.language,
        documents=len(scores),
        tokens=sum(map(len, scores)),
        bytes=int(ids.bytes[: len(scores)].sum()),
        nll=-float(sum(found.sum(dtype=np.float64) for found in scores)),
    )
