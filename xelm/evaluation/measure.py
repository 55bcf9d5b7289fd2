"""Measuring: every model scores every document once, and all routings are computed from those
scores. Calibration is measured on a sample of the tokens, by whole distributions."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from xelm.data.tokenizer import Tokenizer
from xelm.data.vocabulary import Vocabulary
from xelm.evaluation.options import EvaluationOptions
from xelm.evaluation.reliability import Reliability, chosen
from xelm.evaluation.results import System
from xelm.evaluation.summaries import CalibrationSums, Measurement, RouterSums, total_of
from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.pool import OwnVocabulary
from xelm.inference.predictions import predict_documents
from xelm.inference.route import Router, Walk, mixture
from xelm.inference.scoring import checked, score_documents, score_spelled, targets, unpredicted
from xelm.inference.work import finish
from xelm.models.config import ModelConfig
from xelm.models.narrow import compute_dtype
from xelm.progress import bar


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasurementPlan:
    """Which systems are measured on which documents, and how."""

    model: ModelConfig
    """Shape of every model."""
    tokenizer: Tokenizer
    """Tokenizer of every model."""
    models: Mapping[str, Callable[[], Any]]
    """Functions that return the parameters of each model on the host, by name."""
    experts: Sequence[str]
    """Names of the experts that the routers weigh."""
    serving: Mapping[str, int]
    """Language -> index of the expert that serves it, or a language that it falls back to."""
    routers: Mapping[str, Router]
    """Router of each routing."""
    documents: Mapping[str, Sequence[np.ndarray]]
    """Language -> ids of each document."""
    languages: Mapping[str, Sequence[str]]
    """Model -> languages that it is scored on."""
    options: EvaluationOptions
    """How documents are read, and which of the weighed experts are kept at each token."""
    vocabulary: Vocabulary | None = None
    """Vocabulary of the documents; None: the seed's."""
    own: Mapping[str, OwnVocabulary] = field(default_factory=dict)
    """Each model that has another vocabulary -> how it reads in that one, as in `Pool`."""
    mixed: Collection[str] | None = None
    """Languages in which ensembles are measured, and every model is; None: all languages."""

    def token_counts(self) -> dict[str, np.ndarray]:
        """Language -> number of predicted tokens of each document."""
        return {
            tag: np.asarray([len(target) - self.first for target in self._targets(tag)])
            for tag in self.documents
        }

    def measure(self) -> dict[str, dict[System, Measurement]]:
        """Language -> what is measured of every model and of the ensemble under every routing."""
        scores = self._scores()
        cache = ParameterCache(list(self.models.values()))
        own = ParameterCache([one.parameters for one in self.own.values()])
        others = {
            name: replace(one, parameters=partial(own.__getitem__, number))
            for number, (name, one) in enumerate(self.own.items())
        }
        found: dict[str, dict[System, Measurement]] = {}
        with bar(len(self.documents), "routing", "language") as progress:
            for tag in self.documents:
                models = {
                    System(name): Measurement(nats=_nats(known[tag]))
                    for name, known in scores.items()
                    if tag in known
                }
                ensembles, log_weights = {}, {}
                if self.mixed is None or tag in self.mixed:
                    compared = _Compared(self, others, tag)
                    ensembles, log_weights = self._measure_routings(tag, models, scores, compared)
                found[tag] = models | ensembles
                self._add_calibration(tag, found[tag], log_weights, cache)
                progress.update(1)
        return found

    def _measure_routings(
        self,
        tag: str,
        models: Mapping[System, Measurement],
        scores: Mapping[str, Mapping[str, Any]],
        compared: "_Compared",
    ) -> tuple[dict[System, Measurement], dict[System, list[np.ndarray]]]:
        """The ensemble under every routing, with the log weights of the tokens in the sample.
        compared: what routers compare of models that have other vocabularies."""
        wanted, first = self._targets(tag), self.first
        by_model = [scores[name].get(tag) for name in self.weighed]
        sample = self._sample([len(target) - first for target in wanted])
        found: dict[System, Measurement] = {}
        samples: dict[System, list[np.ndarray]] = {}
        for routing, router in self.routers.items():
            by_language = routing == "language"
            if by_language and tag not in self.serving:
                continue
            system, nats, stats = System("ensemble", routing), [], []
            may_differ = self.vocabulary is None and len(self.own) > 0
            preferred: list[int] = []
            samples[system] = []
            expert = self._expert_for(tag, models)
            for number, target in enumerate(wanted):
                # Models that were not scored in this language have no weight.
                unknown = np.full(len(target), -np.inf, np.float32)
                some = by_model[: router.experts]
                own = np.stack([unknown if one is None else one[number] for one in some])
                positions = np.arange(first, len(target))
                told = tag if by_language else None
                walk = Walk(router, told, target, positions)
                log_weights, _, needed = walk.decide(
                    compared.along(walk, number, own), self.options.limits
                )
                nats.append(-mixture(log_weights, own[:, first:]).sum(dtype=np.float64))
                stats.append(_router_sums(np.exp(log_weights), expert, needed))
                if may_differ:
                    after = np.asarray([len(self.documents[tag][number])])
                    end = Walk(router, told, target, after)
                    decision = end.decide(compared.along(end, number, own))
                    preferred.append(int(decision.log_weights.argmax()))
                if number < len(sample):
                    samples[system].append(log_weights[: sample[number]])
            found[system] = Measurement(
                nats=np.asarray(nats),
                router=total_of(stats),
                routed=stats,
                preferred=np.asarray(preferred, int) if may_differ else None,
            )
        return found, samples

    def _add_calibration(
        self,
        tag: str,
        found: Mapping[System, Measurement],
        samples: Mapping[System, Sequence[np.ndarray]],
        cache: ParameterCache,
    ) -> None:
        """Adds to the measurements of a language how well the tokens of its sample are predicted.
        samples: log weights of the ensemble under each routing."""
        wanted, first = self._targets(tag), self.first
        sizes = self._sample([len(target) - first for target in wanted])
        if not sizes:
            return
        models = {name: n for n, name in enumerate(self.models) if System(name) in found}
        names = list(models)
        mixtures = np.full((len(samples), sum(sizes), len(names)), -np.inf, np.float32)
        for way, parts in enumerate(samples.values()):
            log_weights = np.concatenate(parts)
            for column, name in enumerate(self.weighed[: log_weights.shape[1]]):
                if name in names:
                    mixtures[way, :, names.index(name)] = log_weights[:, column]
        predictions = predict_documents(
            self.model,
            [partial(cache.__getitem__, n) for n in models.values()],
            [ids[: first + size] for ids, size in zip(self.documents[tag], sizes)],
            [target[first : first + size] for target, size in zip(wanted, sizes)],
            mixtures,
            first=first,
            **self.reading,
        )
        for number, system in enumerate([*map(System, names), *samples]):
            found[system].calibration = CalibrationSums(
                Reliability.of(predictions.confidence[number], predictions.correct[number]),
                float(predictions.brier[number].sum(dtype=np.float64)),
            )

    def _scores(self) -> dict[str, dict[str, list[np.ndarray]]]:
        """Log probabilities of all tokens by every model; one model at a time is in memory."""
        sizes = {tag: int(counts.sum()) for tag, counts in self.token_counts().items()}
        total = sum(sizes[tag] for tags in self.languages.values() for tag in tags)
        scores: dict[str, dict[str, list[np.ndarray]]] = {}
        with bar(total, "evaluate", "tok") as progress:
            for name, load in self.models.items():
                tags = self.languages[name]
                if not tags:
                    scores[name] = {}
                    continue
                parameters = jax.device_put(load())
                documents = [ids for tag in tags for ids in self.documents[tag]]
                options: dict[str, Any] = {**self.reading, "progress": progress.update}
                found = score_documents(self.model, parameters, documents, **options)
                found = iter(checked(name, found))
                scores[name] = {tag: [next(found) for _ in self.documents[tag]] for tag in tags}
        return scores

    @property
    def first(self) -> int:
        """Index of the first target of a document that is predicted."""
        return unpredicted(self.model, self.tokenizer.text_format)

    @property
    def reading(self) -> dict[str, Any]:
        """Options of `score_documents`."""
        length, stride = self.options.windows
        form = self.tokenizer.text_format
        dtype = compute_dtype(self.options.dtype)
        return {"text_format": form, "context_length": length, "stride": stride, "dtype": dtype}

    @property
    def weighed(self) -> list[str]:
        """Models in the order in which routers weigh them: the experts, then those behind them."""
        return [*self.experts, *(name for name in self.models if name not in self.experts)]

    def _targets(self, tag: str) -> list[np.ndarray]:
        """Tokens that a model predicts of each document of a language, the first one included."""
        form = self.tokenizer.text_format
        return [targets(self.model, np.asarray(d, np.int64), form) for d in self.documents[tag]]

    def _expert_for(self, tag: str, models: Mapping[System, Measurement]) -> int:
        """Index of the expert that serves a language or, where none does, of the best one there."""
        if tag in self.serving:
            return self.serving[tag]
        return int(np.argmin([models[System(name)].nats.sum() for name in self.experts]))

    def _sample(self, sizes: Sequence[int]) -> list[int]:
        """Number of tokens of each of the first documents that are in the sample."""
        before = np.cumsum([0, *sizes])
        left = self.options.calibration_tokens - before[:-1]
        return np.minimum(sizes, left)[left > 0].tolist()


class _Compared:
    """What routers compare along the documents of a language: the models' scores, with those in
    their own vocabularies of the models that have others. These are read when a router first needs
    them, once with all of each document known and once with none."""

    def __init__(self, plan: MeasurementPlan, own: Mapping[str, OwnVocabulary], tag: str):
        self._plan, self._own, self._tag = plan, own, tag
        self._found: dict[bool, dict[str, list[np.ndarray]]] = {}

    def along(self, walk: Walk, number: int, scores: np.ndarray) -> np.ndarray:
        """The scores [E, T] that a router compares along a document. scores: those in the
        vocabulary of the documents."""
        if not self._own or not walk.needs_log_likelihoods:
            return scores
        whole = walk.known == len(self._plan.documents[self._tag][number])
        if whole not in self._found:
            self._found[whole] = {name: self._read(name, whole) for name in self._own}
        found = scores.copy()
        for row, name in enumerate(self._plan.weighed[: len(scores)]):
            if name in self._own and self._tag in self._plan.languages[name]:
                one = self._found[whole][name][number]
                found[row, : len(one)] = one
        return found

    def _read(self, name: str, whole: bool) -> list[np.ndarray]:
        """What a model gives to the tokens of each document in its own vocabulary."""
        plan, documents = self._plan, self._plan.documents[self._tag]
        texts = [(ids, len(ids) if whole else plan.first, None) for ids in documents]
        return finish(score_spelled(self._own[name], plan.vocabulary, texts, plan.reading))


def in_own_pieces(
    measured: dict[str, dict[System, Measurement]],
    further: Mapping[str, Mapping[System, Measurement]],
    tokens: Mapping[str, np.ndarray],
    owners: Collection[int],
    names: Collection[str],
) -> None:
    """Puts what was measured in further pieces in the place of what was measured in the seed's: of
    the models that have these pieces, and of ensembles on the documents after which one of those
    models has the largest weight. Ensembles have no calibration where documents are read in several
    vocabularies.

    further: as `measured`. tokens: language -> number of predicted tokens of each document in these
    pieces. owners, names: the models that have them, as routers number them and by name."""
    for tag, found in further.items():
        for system, one in found.items():
            one.tokens, before = tokens[tag], measured[tag].get(system)
            if system.name in names:
                measured[tag][system] = one
            elif before is not None and before.preferred is not None:
                chosen = np.isin(before.preferred, list(owners))
                measured[tag][system] = _chosen(before, one, chosen)


def _chosen(before: Measurement, other: Measurement, chosen: np.ndarray) -> Measurement:
    """One measurement on some documents, and another on the others."""
    if not chosen.any():
        return before
    assert other.tokens is not None
    routed = [b if c else a for a, b, c in zip(before.routed, other.routed, chosen)]
    counts = np.asarray([sums.reliability.total for sums in before.routed])
    return Measurement(
        nats=np.where(chosen, other.nats, before.nats),
        calibration=other.calibration if chosen.all() else None,
        router=total_of(routed),
        tokens=np.where(chosen, other.tokens, counts if before.tokens is None else before.tokens),
        routed=routed,
        preferred=before.preferred,
    )


def _nats(scores: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray([-document.sum(dtype=np.float64) for document in scores])


def _router_sums(weights: np.ndarray, expert: int, needed: np.ndarray) -> RouterSums:
    """Sums over the tokens of a document. weights: [T, E]. expert: index of the right one. needed:
    where the router needs all experts to read the text, whatever their weights."""
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.where(weights > 0, weights * -np.log2(weights), 0.0).sum()
    return RouterSums(
        Reliability.of(*chosen(weights, expert)),
        float(entropy),
        float(np.where(needed, weights.shape[1], (weights > 0).sum(axis=1)).sum()),
    )
