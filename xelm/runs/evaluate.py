"""`xelm evaluate`: perplexity and bits per byte by language, for every system of a RUN.

Each model scores every document once; all routings are computed from those scores.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clustering.errors import UserError
from clustering.languages import canonical_all, find, lookup
from experts.expert import SEED, Expert, parse_reference
from experts.registry import Registry
from xelm.data.contents import contents_of
from xelm.data.corpus import AnyCorpus, Corpus
from xelm.data.store import Store, TokenizedLanguage
from xelm.data.tokenizer import Tokenizer
from xelm.evaluation.options import CALIBRATION_TOKENS, EVALUATED
from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.predictions import predict_documents
from xelm.inference.reliability import Reliability, chosen
from xelm.inference.route import Router, Walk, mixture
from xelm.inference.routing import Limits, Routing
from xelm.inference.scoring import check_windows, score_documents, targets, unpredicted
from xelm.models.checkpoint import read_config, read_for_inference
from xelm.models.config import ModelConfig
from xelm.progress import bar
from xelm.runs.check import check_models
from xelm.runs.ensembles import check_top_m
from xelm.runs.init import tokenise
from xelm.runs.judging import (
    Expectations,
    Guessed,
    Measured,
    System,
    Weighed,
    judged,
)
from xelm.runs.make_router import general_models, make_router, serving
from xelm.runs.results import Results, write_results
from xelm.runs.run import Run
from xelm.runs.texts import EVALUATION, LanguageText, compared, warnings


def evaluate(
    run: Run,
    corpus: AnyCorpus,
    *,
    routings: Sequence[str] = EVALUATED,
    top_m: int | None = None,
    least_weight: float = 0.001,
    temperature: float | None = None,
    languages: Sequence[str] | None = None,
    max_documents: int | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    context_length: int | None = None,
    stride: int | None = None,
    save: bool = True,
) -> Results:
    """Scores the seed, the dense baseline if there is one, every published expert, and their
    ensemble under each routing; writes RUN/results/results.json, and keeps one of other text or
    options under another name. Where routing by language is the only one, each expert is scored on
    the languages it serves alone, at the cost of one model.

    languages: of the corpus, to measure on; None takes all.
    max_documents: of each language, the first in the corpus; None takes all.
    calibration_tokens: of each language, the first, whose whole distributions are looked at.
    context_length: tokens that a model reads at once; None is the models' own length
    (`Run.context_length`). stride: tokens from one window of a longer document to the next, as in
    `score_documents`; None is context_length.
    """
    model, experts = read_config(run.seed), run.registry().published()
    options = _Options(
        routings=routings,
        top_m=top_m,
        least_weight=least_weight,
        temperature=temperature,
        max_documents=max_documents,
        calibration_tokens=calibration_tokens,
        context_length=run.context_length() if context_length is None else context_length,
        stride=stride,
    )
    options.check(model, len(experts))
    check_models(run, experts, general_models(run))
    corpus = Corpus.of(corpus)
    name = EVALUATION + hashlib.sha256(str(corpus).encode()).hexdigest()[:8]
    tags = None if languages is None else canonical_all(languages)
    tokenizer, found = run.tokenizer(), contents_of(corpus.pinned(), tags)
    store = tokenise(run, found, tokenizer, name, training=False)
    called = _called(run, experts, store)
    ids_of = {called[tag]: ids for tag, ids in store.languages.items()}
    texts = {called[tag]: text for tag, text in _compared(run, store, max_documents).items()}
    evaluation = _prepared(run, model, tokenizer, experts, ids_of, options)
    tokens = evaluation.tokens()
    sizes = {tag: ids.bytes[: len(tokens[tag])] for tag, ids in ids_of.items()}
    unspelled = [tag for tag, text in texts.items() if text.unspelled]
    expected = replace(_expectations(run, experts), unspelled=unspelled)
    results = replace(judged(evaluation.measured(), tokens, sizes, expected), texts=texts)
    if not save:
        return results
    made_of = {
        "corpus_sha256": store.record["corpus_sha256"],
        "languages": sorted(ids_of),
        **options.to_json(),
        "start_token": run.config.start_token,
    }
    return write_results(run, str(corpus), made_of, results)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    """How text is measured, by the names that `evaluate` has for it."""

    routings: Sequence[str]
    top_m: int | None
    least_weight: float
    temperature: float | None
    max_documents: int | None
    calibration_tokens: int
    context_length: int
    stride: int | None

    def check(self, model: ModelConfig, experts: int) -> None:
        """UserError for what cannot be, before any work."""
        if "fixed" in self.routings:
            raise UserError(
                f"evaluate knows the routings {', '.join(EVALUATED)} and uniform; got fixed"
            )
        _ = self.routing  # made to be checked
        if self.max_documents is not None and self.max_documents < 1:
            raise UserError(f"max_documents must be at least 1; got {self.max_documents}")
        if self.calibration_tokens < 0:
            raise UserError(f"calibration_tokens must be at least 0; got {self.calibration_tokens}")
        check_windows(model, self.context_length, self.stride)
        if experts:
            check_top_m(self.top_m, experts)
            if self.temperature is not None and "tfidf" not in self.routings:
                raise UserError(
                    "a router's temperature goes with routing tfidf, which is not asked for"
                )

    @property
    def routing(self) -> list[Routing]:
        """The routers, in the order asked for."""
        warmth = {"tfidf": self.temperature}
        return [
            Routing(name=name, least_weight=self.least_weight, temperature=warmth.get(name))
            for name in self.routings
        ]

    def to_json(self) -> dict[str, Any]:
        """As results.json has them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        stride = self.stride or self.context_length
        return {**values, "routings": list(self.routings), "stride": stride}


def _prepared(
    run: Run,
    model: ModelConfig,
    tokenizer: Tokenizer,
    experts: Sequence[Expert],
    texts: Mapping[str, TokenizedLanguage],
    options: _Options,
) -> "_Evaluation":
    """Which system is asked in which language, and the routers."""
    systems = general_models(run)
    systems |= {expert.name: expert.directory(run.directory) for expert in experts}
    serves, chosen = serving(run.registry(), experts), options.routing
    if not serves:  # by clusters of documents
        chosen = [routing for routing in chosen if routing.name != "detected"]
    found = {tag: lookup(tag, serves) for tag in texts}
    served = {tag: serves[other] for tag, other in found.items() if other is not None}
    asked = {system: list(texts) for system in systems}
    if set(options.routings) == {"language"}:
        for index, expert in enumerate(experts):
            asked[expert.name] = [tag for tag in texts if served.get(tag) == index]
    most = options.max_documents
    return _Evaluation(
        run=run,
        model=model,
        tokenizer=tokenizer,
        windows=(options.context_length, options.stride or options.context_length),
        systems=systems,
        experts=[expert.name for expert in experts],
        served=served,
        routers={r.name: make_router(run, experts, r) for r in chosen} if experts else {},
        limits=Limits(top_m=options.top_m, least_weight=options.least_weight),
        documents={
            tag: [ids.document(n) for n in range(min(len(ids), most or len(ids)))]
            for tag, ids in texts.items()
        },
        asked=asked,
        calibration_tokens=options.calibration_tokens,
    )


def _called(run: Run, experts: Sequence[Expert], store: Store) -> dict[str, str]:
    """Language of the text -> what the RUN calls it: one of an earlier version may have `ko-Hang`
    for `ko`."""
    known = [*run.languages, *(tag for expert in experts for tag in expert.languages)]
    return {tag: find(tag, known) or tag for tag in store.languages}


def _compared(run: Run, store: Store, max_documents: int | None) -> dict[str, LanguageText]:
    """What is known of the evaluated text, with what is wrong with it on stderr."""
    texts, lacking = compared(run, store, max_documents)
    lines = warnings(texts)
    if lacking:
        lines.append(
            f"whether this text was trained on is unknown: {', '.join(lacking)} in "
            f"{run.directory / 'corpus'} was tokenised by an earlier version of xelm, which kept "
            "nothing to compare with"
        )
    for line in lines:
        print(line, file=sys.stderr)
    return texts


def _expectations(run: Run, experts: Sequence[Expert]) -> Expectations:
    trained: dict[str, Sequence[str]] = {"dense": run.languages}
    if all(expert.languages for expert in experts):
        trained |= {expert.name: _trained(run.registry(), expert) for expert in experts}
        trained["ensemble"] = [tag for expert in experts for tag in expert.languages]
    return Expectations(
        experts=[expert.name for expert in experts], languages=run.languages, trained=trained
    )


def _trained(registry: Registry, expert: Expert) -> list[str]:
    """Languages that an expert and those it comes from were trained on, after the seed."""
    found = list(expert.languages)
    while expert.parent != SEED:
        expert = registry.expert(*parse_reference(expert.parent))
        found += expert.languages
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Evaluation:
    """Who is asked what."""

    run: Run
    model: ModelConfig
    tokenizer: Tokenizer
    windows: tuple[int, int]
    """Tokens that are read at once, and from one window of a document to the next."""
    systems: Mapping[str, Path]
    """Single models -> their checkpoints, experts last."""
    experts: Sequence[str]
    """Of the ensemble."""
    served: Mapping[str, int]
    """Language of the text -> the expert that serves it, or a language it falls back to."""
    routers: Mapping[str, Router]
    """By routing."""
    limits: Limits
    """Which of the weighed experts are kept at each token."""
    documents: Mapping[str, Sequence[np.ndarray]]
    """Ids, by language."""
    asked: Mapping[str, Sequence[str]]
    """System -> languages."""
    calibration_tokens: int
    """Of each language."""

    @property
    def first(self) -> int:
        """The first of a document's targets that is predicted."""
        return unpredicted(self.tokenizer.start_id) if self.model.causal else 0

    @property
    def reading(self) -> dict[str, Any]:
        """How documents are read."""
        return {
            "start_id": self.tokenizer.start_id,
            "end_id": self.tokenizer.end_id,
            "context_length": self.windows[0],
            "stride": self.windows[1],
            "mask_id": self.tokenizer.mask_id,
        }

    @property
    def weighed(self) -> list[str]:
        """Models in the order in which routers weigh them: the experts, then those behind them."""
        return [*self.experts, *(name for name in self.systems if name not in self.experts)]

    def targets(self, tag: str) -> list[np.ndarray]:
        """What a model is asked to predict of each document of a language."""
        end = self.tokenizer.end_id
        return [targets(self.model, np.asarray(d, np.int64), end) for d in self.documents[tag]]

    def tokens(self) -> dict[str, np.ndarray]:
        """How many are predicted, by language and document."""
        first = self.first
        return {
            tag: np.asarray([len(w) - first for w in self.targets(tag)]) for tag in self.documents
        }

    def measured(self) -> dict[str, dict[System, Measured]]:
        """By language: every model, then the ensemble under every routing."""
        scores = self._scores()
        cache = ParameterCache(
            [partial(read_for_inference, path, self.model) for path in self.systems.values()]
        )
        found = {}
        with bar(len(self.documents), "routing", "language") as progress:
            for tag in self.documents:
                found[tag] = self._of_language(tag, scores, cache)
                progress.update(1)
        return found

    def _of_language(
        self,
        tag: str,
        scores: Mapping[str, Mapping[str, Sequence[np.ndarray]]],
        cache: ParameterCache,
    ) -> dict[System, Measured]:
        wanted, first = self.targets(tag), self.first
        found: dict[System, Measured] = {}
        for system in self.systems:
            if tag in scores[system]:
                nats = [-own.sum(dtype=np.float64) for own in scores[system][tag]]
                found[system, None] = Measured(nats=np.asarray(nats))
        by_model = [scores[name].get(tag) for name in self.weighed]
        sizes = self._sample([len(target) - first for target in wanted])
        samples: dict[System, list[np.ndarray]] = {}
        for routing, router in self.routers.items():
            if routing == "language" and tag not in self.served:
                continue
            told = tag if routing == "language" else None
            nats, weighed, heads = [], None, []
            expert = self._expert_for(tag, found)
            for number, target in enumerate(wanted):
                # Experts that were not asked have no weight.
                silent = np.full(len(target), -np.inf, np.float32)
                some = by_model[: router.experts]
                own = np.stack([silent if one is None else one[number] for one in some])
                walk = Walk.along(router, told, target, np.arange(first, len(target)))
                log_weights, _, needed = walk.decide(own, self.limits)
                nats.append(-mixture(log_weights, own[:, first:]).sum(dtype=np.float64))
                part = _weighed(np.exp(log_weights), expert, needed)
                weighed = part if weighed is None else weighed + part
                if number < len(sizes):
                    heads.append(log_weights[: sizes[number]])
            system = ("ensemble", routing)
            found[system] = Measured(nats=np.asarray(nats), weighed=weighed)
            samples[system] = heads
        if sizes:
            self._guess(tag, found, wanted, sizes, samples, cache)
        return found

    def _expert_for(self, tag: str, found: Mapping[System, Measured]) -> int:
        """The index of the one that serves a language or, where none does, of the best there."""
        if tag in self.served:
            return self.served[tag]
        return int(np.argmin([found[name, None].nats.sum() for name in self.experts]))

    def _sample(self, sizes: Sequence[int]) -> list[int]:
        """How many tokens of the first documents are looked at."""
        chosen, left = [], self.calibration_tokens
        for size in sizes:
            if left <= 0:
                break
            chosen.append(min(size, left))
            left -= size
        return chosen

    def _guess(
        self,
        tag: str,
        found: Mapping[System, Measured],
        wanted: Sequence[np.ndarray],
        sizes: Sequence[int],
        samples: Mapping[System, Sequence[np.ndarray]],
        cache: ParameterCache,
    ) -> None:
        """Adds to what was found how the first so many tokens of documents are predicted."""
        asked = [n for n, system in enumerate(self.systems) if (system, None) in found]
        names = [name for n, name in enumerate(self.systems) if n in asked]
        total = sum(sizes)
        mixtures = np.full((len(samples), total, len(asked)), -np.inf, np.float32)
        for way, heads in enumerate(samples.values()):
            log_weights = np.concatenate(heads)
            for column, name in enumerate(self.weighed[: log_weights.shape[1]]):
                if name in names:
                    mixtures[way, :, names.index(name)] = log_weights[:, column]
        places = [slice(self.first, self.first + size) for size in sizes]
        guesses = predict_documents(
            self.model,
            [partial(cache.__getitem__, n) for n in asked],
            [ids[: place.stop] for ids, place in zip(self.documents[tag], places)],
            [target[place] for target, place in zip(wanted, places)],
            mixtures,
            places=places,
            **self.reading,
        )
        for number, system in enumerate([*((name, None) for name in names), *samples]):
            found[system].guessed = Guessed(
                Reliability.of(guesses.confidence[number], guesses.correct[number]),
                float(guesses.brier[number].sum(dtype=np.float64)),
            )

    def _scores(self) -> dict[str, dict[str, list[np.ndarray]]]:
        """system -> each language it is asked in -> log probabilities of each document's tokens.
        One model at a time is in memory."""
        reading = self.reading
        sizes = {tag: int(counts.sum()) for tag, counts in self.tokens().items()}
        total = sum(sizes[tag] for tags in self.asked.values() for tag in tags)
        scores: dict[str, dict[str, list[np.ndarray]]] = {}
        with bar(total, "evaluate", "tok") as progress:
            for system, directory in self.systems.items():
                parameters = jax.device_put(read_for_inference(directory, self.model))
                flat = [ids for tag in self.asked[system] for ids in self.documents[tag]]
                found = iter(
                    score_documents(
                        self.model,
                        parameters,
                        flat,
                        progress=progress.update,
                        **reading,
                    )
                )
                scores[system] = {
                    tag: [next(found) for _ in self.documents[tag]] for tag in self.asked[system]
                }
        return scores


def _weighed(weights: np.ndarray, expert: int, asks: np.ndarray) -> Weighed:
    """Of one document. asks: where all experts are asked, whatever they weigh."""
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.where(weights > 0, weights * -np.log2(weights), 0.0).sum()
    return Weighed(
        Reliability.of(*chosen(weights, expert)),
        float(entropy),
        float(np.where(asks, weights.shape[1], (weights > 0).sum(axis=1)).sum()),
    )
