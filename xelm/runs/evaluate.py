"""`xelm evaluate`: perplexity and bits per byte by language, of every model of a RUN and of the
ensemble; opens the RUN and the text, has them measured, and writes the results."""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clustering.languages import canonical_all, lookup
from experts.expert import SEED, Expert, parse_reference
from experts.manifest import MERGES, STUDENTS
from experts.registry import Registry
from xelm.data.contents import contents_of
from xelm.data.corpus import AnyCorpus, Corpus
from xelm.data.store import Store
from xelm.data.text_stats import warnings
from xelm.data.vocabulary import Vocabulary
from xelm.evaluation.measure import MeasurementPlan, in_own_pieces
from xelm.evaluation.options import EvaluationOptions
from xelm.evaluation.results import Results, System
from xelm.evaluation.summaries import Background, Measurement, summarise
from xelm.inference.pool import OwnVocabulary, check_windows
from xelm.inference.vocabularies import InPieces, loader, same
from xelm.models.checkpoint import read_config, read_for_inference
from xelm.models.vocabulary_rows import resized
from xelm.runs.check import check_models, is_mixture
from xelm.runs.combined import made_of
from xelm.runs.ensembles import check_top_m
from xelm.runs.make_router import general_models, make_router, serving
from xelm.runs.overlap import compare_with_training
from xelm.runs.results import write_results
from xelm.runs.run import Run
from xelm.runs.shares import unassigned
from xelm.runs.text import tokenise
from xelm.runs.vocabulary import in_vocabulary, vocabulary_of


def evaluate(
    run: Run,
    corpus: AnyCorpus,
    options: EvaluationOptions | None = None,
    *,
    languages: Sequence[str] | None = None,
    save: bool = True,
) -> Results:
    """Scores the seed, the dense baseline if there is one, merged models, every published expert,
    and the ensemble of the experts under each routing. With routing by language alone, each expert
    is scored only on the languages that it serves, at the cost of one model.

    options: None: the defaults. languages: of the corpus, to measure on; None: all. save: write
    RUN/results/results.json, and keep one of other text or options under another name. Prints on
    stderr for which languages the figures mean little.
    """
    experts, options = run.registry().published(), options or EvaluationOptions()
    if options.context_length is None:
        options = replace(options, context_length=run.context_length())
    check_windows(read_config(run.seed), *options.windows)
    if experts:
        check_top_m(options.top_m, len(experts))
    check_models(run, experts, general_models(run) | run.combined())
    corpus = Corpus.of(corpus)
    contents = contents_of(corpus.pinned(), None if languages is None else canonical_all(languages))
    name = f"evaluation-{hashlib.sha256(str(corpus).encode()).hexdigest()[:8]}"
    store = tokenise(run, contents, name, training=False)
    stats = compare_with_training(run, store, options.max_documents)
    for line in warnings(stats):
        print(line, file=sys.stderr)
    scored = slice(options.max_documents)
    sizes = {tag: ids.bytes[scored] for tag, ids in store.languages.items()}
    plan = _plan(run, experts, _documents(store, scored), options)
    measured = plan.measure()
    for name in filter(is_mixture, run.combined()):
        _measure_alone(run, name, plan, measured)
    for vocabulary in {one.key: one for one in _vocabularies(run, experts) if one}.values():
        spelled = in_vocabulary(run, store, contents, vocabulary.directory)
        _measure_in(run, experts, vocabulary, _documents(spelled, scored), plan, measured)
    background = _background(run, experts, [tag for tag, text in stats.items() if text.unspelled])
    results = summarise(measured, plan.token_counts(), sizes, background)
    results = replace(results, texts=stats)
    if not save:
        return results
    facts = {
        "corpus_sha256": store.record["corpus_sha256"],
        "languages": sorted(store.languages),
        **options.to_json(),
        "start_token": run.config.start_token,
    }
    return write_results(run, str(corpus), facts, results, experts)


def _plan(
    run: Run,
    experts: Sequence[Expert],
    documents: Mapping[str, Sequence[np.ndarray]],
    options: EvaluationOptions,
) -> MeasurementPlan:
    """Which model is scored on which language, and the routers."""
    checkpoints = _checkpoints(run, experts)
    serves, routings = serving(experts), options.routing
    if not serves:  # experts of clusters of documents
        routings = [routing for routing in routings if routing.name != "detected"]
    found = {tag: lookup(tag, serves) for tag in documents}
    served = {tag: serves[other] for tag, other in found.items() if other is not None}
    languages = {name: list(documents) for name in checkpoints}
    if set(options.routings) == {"language"}:
        for index, expert in enumerate(experts):
            languages[expert.name] = [tag for tag in documents if served.get(tag) == index]
    return MeasurementPlan(
        model=read_config(run.seed),
        tokenizer=run.tokenizer(),
        models=_loaders(run, checkpoints, None, options.dtype),
        experts=[expert.name for expert in experts],
        serving=served,
        routers={r.name: make_router(run, experts, r) for r in routings} if experts else {},
        options=options,
        documents=documents,
        languages=languages,
        own=_in_own_vocabulary(run, checkpoints, None, options.dtype),
    )


def _in_own_vocabulary(
    run: Run, checkpoints: Mapping[str, Path], vocabulary: Vocabulary | None, dtype: str
) -> dict[str, OwnVocabulary]:
    """How the models that have another vocabulary than this one read in their own."""
    found, model = dict[str, OwnVocabulary](), read_config(run.seed)
    for name, path in checkpoints.items():
        own = vocabulary_of(run, path)
        if not same(own, vocabulary):
            shape = model if own is None else resized(model, own.size)
            load = partial(read_for_inference, path, shape, dtype)
            found[name] = OwnVocabulary(model=shape, parameters=load, vocabulary=own)
    return found


def _checkpoints(run: Run, experts: Sequence[Expert]) -> dict[str, Path]:
    """Name and checkpoint of every model that is measured."""
    own = {expert.name: expert.directory(run.directory) for expert in experts}
    combined = {n: path for n, path in run.combined().items() if not is_mixture(n)}
    return general_models(run) | own | combined  # behind those that routers weigh


def _measure_alone(
    run: Run, name: str, plan: MeasurementPlan, measured: dict[str, dict[System, Measurement]]
) -> None:
    """Adds the measurement of a model of another shape, on the documents of `plan`."""
    path = run.combined()[name]
    shape = read_config(path)
    alone = replace(
        plan,
        model=shape,
        models={name: partial(read_for_inference, path, shape, plan.options.dtype)},
        experts=(),
        routers={},
        languages={name: list(plan.documents)},
    )
    for tag, found in alone.measure().items():
        measured[tag] |= found


def _loaders(
    run: Run, checkpoints: Mapping[str, Path], vocabulary: Vocabulary | None, dtype: str
) -> dict[str, Callable[[], Any]]:
    """Functions that return the parameters of models for text in a vocabulary."""
    model = read_config(run.seed)
    return {
        name: loader(
            partial(read_for_inference, path, dtype=dtype),
            model,
            vocabulary_of(run, path),
            vocabulary,
        )
        for name, path in checkpoints.items()
    }


def _documents(store: Store, scored: slice) -> dict[str, list[np.ndarray]]:
    """Language -> ids of its first documents."""
    return {
        tag: [ids.document(n) for n in range(len(ids))[scored]]
        for tag, ids in store.languages.items()
    }


def _vocabularies(run: Run, experts: Sequence[Expert]) -> list[Vocabulary | None]:
    """The vocabulary of each expert; None for the seed's."""
    return [vocabulary_of(run, expert.directory(run.directory)) for expert in experts]


def _measure_in(
    run: Run,
    experts: Sequence[Expert],
    vocabulary: Vocabulary,
    documents: Mapping[str, Sequence[np.ndarray]],
    plan: MeasurementPlan,
    measured: dict[str, dict[System, Measurement]],
) -> None:
    """Measures in the pieces of a vocabulary the experts that have it, and the ensembles in the
    languages of documents that are read in it; puts this in the place of what `plan` measured in
    the seed's. documents: language -> ids of its documents in these pieces."""
    found = _vocabularies(run, experts)
    owners = [n for n, own in enumerate(found) if own is not None and own.key == vocabulary.key]
    names = [experts[number].name for number in owners]
    mixed = [
        tag
        for tag, systems in measured.items()
        if any(
            one.preferred is not None and np.isin(one.preferred, owners).any()
            for one in systems.values()
        )
    ]
    checkpoints = _checkpoints(run, experts)
    routers = {
        name: InPieces(router=router, vocabulary=vocabulary, owners=owners, given=name == "fixed")
        for name, router in plan.routers.items()
    }
    languages = {
        name: plan.languages[name]
        if name in names
        else [tag for tag in plan.languages[name] if tag in mixed]
        for name in checkpoints
    }
    further = replace(
        plan,
        model=resized(plan.model, vocabulary.size),
        tokenizer=vocabulary.tokenizer,
        models=_loaders(run, checkpoints, vocabulary, plan.options.dtype),
        routers=routers,
        documents=documents,
        languages=languages,
        vocabulary=vocabulary,
        own=_in_own_vocabulary(run, checkpoints, vocabulary, plan.options.dtype),
        mixed=mixed,
    )
    in_own_pieces(measured, further.measure(), further.token_counts(), owners, names)


def _background(run: Run, experts: Sequence[Expert], unspelled: Sequence[str]) -> Background:
    """Which languages each system was trained on, after the seed."""
    of_dense = [tag for tag in run.languages if tag not in unassigned(run)]
    trained: dict[str, Sequence[str]] = {"dense": of_dense}
    if all(expert.languages for expert in experts):
        registry = run.registry()
        trained |= {expert.name: _trained(registry, expert) for expert in experts}
        trained["ensemble"] = [tag for expert in experts for tag in expert.languages]
        known = {name: _trained_together(run, registry, name, of_dense) for name in run.combined()}
        trained |= {name: tags for name, tags in known.items() if tags is not None}
    names = [expert.name for expert in experts]
    return Background(experts=names, languages=run.languages, trained=trained, unspelled=unspelled)


def _trained(registry: Registry, expert: Expert) -> list[str]:
    """Languages that an expert, its donor and its ancestors were trained on, after the seed."""
    found = list(expert.languages)
    if expert.donor not in (None, SEED):
        found += registry.expert(*parse_reference(expert.donor)).languages
    while expert.parent != SEED:
        expert = registry.expert(*parse_reference(expert.parent))
        found += expert.languages
    return found


def _trained_together(
    run: Run, registry: Registry, name: str, of_dense: Sequence[str]
) -> list[str] | None:
    """Languages that a model of `Run.combined`, and what it was made of, were trained on after the
    seed; None where that is not known. A student reads the text of dense alone."""
    kind, found = name.partition("/")[0], list[str]()
    known = {expert.reference: expert for expert in registry.experts}
    for source in () if kind == STUDENTS else made_of(run, registry, name):
        tags: list[str] | None = [] if source == SEED else None
        if source == run.dense.name:
            tags = list(of_dense)
        elif source in run.combined():
            tags = _trained_together(run, registry, source, of_dense)
        elif source in known:
            tags = _trained(registry, known[source])
        if tags is None:
            return None
        found += tags
    return found if kind == MERGES else [*found, *of_dense]
