"""Routers over the published experts of a RUN: what each is made of, and what is fitted for it.

What is fitted lies in RUN/routers, under a name that says what it was made from: when an expert
joins, it is fitted again, in seconds, and nothing else is.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from clustering import identify
from clustering.errors import UserError
from clustering.files import read_arrays, write_arrays
from clustering.identify import Identifier
from experts import manifest
from experts.expert import Expert
from experts.registry import Registry
from xelm.data.rows import Source
from xelm.data.store import LanguageIds
from xelm.inference.routers import (
    DEFAULT,
    DISTANCE_POWER,
    ROUTINGS,
    TEMPERATURE,
    Abstaining,
    ByLanguage,
    Detected,
    Fixed,
    Learned,
    Posterior,
    Tfidf,
    check_tfidf,
    uniform,
)
from xelm.inference.routing import Router
from xelm.models.checkpoint import read_config
from xelm.runs.run import Run
from xelm.runs.training import CENTRE, cluster_sources

FITTED_TOKENS = 300_000
"""Of each language or expert that something is fitted on, at most: more change little."""
_FORMAT = 1
"""Of what is fitted; rises when the same facts give something else."""
_HELD_OUT = 10
"""One document in so many is kept from the fit, to calibrate it."""

ABSTAIN_TO = ("posterior", "seed", "dense")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Which router, and how. None: as the router has it."""

    name: str = DEFAULT
    """One of `ROUTINGS`."""
    top_m: int | None = None
    """Experts that are kept; None keeps all that have weight."""
    least_weight: float = 0.001
    """Experts with less are not asked: their part of the mixture is hardly more than that, and
    costs as much as any other's."""
    temperature: float | None = None
    """Of TF-IDF."""
    distance_power: float | None = None
    """Of TF-IDF: 2, or 4 as in the authors' code."""
    memory: float | None = None
    """Of the posterior; below 1 it forgets."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of experts, of fixed ones; those not named have none."""
    abstain: float | None = None
    """Largest weight below which the router leaves it to `abstain_to`."""
    abstain_to: Literal["posterior", "seed", "dense"] = "posterior"
    """Who speaks then."""

    def __post_init__(self) -> None:
        if self.name not in ROUTINGS:
            raise UserError(f"routing must be one of {', '.join(ROUTINGS)}; got {self.name!r}")
        for option, value, home in (
            ("temperature", self.temperature, "tfidf"),
            ("distance power", self.distance_power, "tfidf"),
            ("memory", self.memory, "posterior"),
            ("weights", self.weights or None, "fixed"),
        ):
            if value is not None and self.name != home:
                raise UserError(f"a router's {option} goes with routing {home}; got {self.name}")
        if not 0 <= self.least_weight < 1:
            raise UserError(
                f"the least weight must be at least 0 and below 1; got {self.least_weight}"
            )
        if self.name == "tfidf":
            check_tfidf(*self.tfidf)
        if self.name == "fixed" and not self.weights:
            raise UserError("fixed routing wants weights of experts, such as --weights en=.7,de=.3")
        if self.abstain is not None and not 0 <= self.abstain <= 1:
            raise UserError(f"a threshold must be between 0 and 1; got {self.abstain}")
        if self.abstain_to not in ABSTAIN_TO:
            raise UserError(
                f"abstaining goes to one of {', '.join(ABSTAIN_TO)}; got {self.abstain_to!r}"
            )
        if self.abstain is None and self.abstain_to != "posterior":
            raise UserError(f"whoever leaves it to {self.abstain_to} needs abstain, a threshold")
        if self.abstain is not None and self.name in ("posterior", "language"):
            raise UserError(f"abstaining goes with other routings than {self.name}")

    @property
    def tfidf(self) -> tuple[float, float]:
        """Temperature and distance power of TF-IDF."""
        power = DISTANCE_POWER if self.distance_power is None else self.distance_power
        return TEMPERATURE if self.temperature is None else self.temperature, power


def make_router(run: Run, experts: Sequence[Expert], routing: Routing) -> Router:
    """The router over these experts. Whatever it is, a text that is said to be in a language that
    an expert serves goes to that expert; only weights that were given by hand stay."""
    served = serving(run.registry(), experts)
    if routing.name == "language":
        return ByLanguage(experts=len(experts), serving=served)
    router = _router(run, experts, routing)
    if routing.abstain is not None:
        router = Abstaining(
            router=router,
            threshold=routing.abstain,
            fallback=None if routing.abstain_to == "posterior" else len(experts),
            fallback_name=routing.abstain_to,
            prior=uniform(len(experts)).weights,
        )
    if routing.name == "fixed":
        return router
    return ByLanguage(experts=router.experts, serving=served, otherwise=router)


def _router(run: Run, experts: Sequence[Expert], routing: Routing) -> Router:
    count = len(experts)
    if routing.name == "uniform":
        return uniform(count)
    if routing.name == "fixed":
        return Fixed(weights=_fixed([expert.name for expert in experts], routing.weights))
    if routing.name == "posterior":
        memory = 1.0 if routing.memory is None else routing.memory
        return Posterior(prior=uniform(count).weights, memory=memory)
    if routing.name == "detected":
        served = serving(run.registry(), experts)
        if not served:
            raise UserError(
                f"no expert of {run.directory} serves a language of its own: detected routing has "
                "nothing to go by"
            )
        return Detected(
            experts=count, identifier=identifier(run), pieces=pieces(run), serving=served
        )
    if routing.name == "learned":
        return _learned(run, experts)
    temperature, distance_power = routing.tfidf
    centres = [read_arrays(e.directory(run.directory) / CENTRE)["centre"] for e in experts]
    return Tfidf(
        vectoriser=run.vectoriser(),
        centres=np.stack(centres),
        temperature=temperature,
        distance_power=distance_power,
    )


def _fixed(names: Sequence[str], weights: Mapping[str, float]) -> np.ndarray:
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise UserError(
            f"there is no published expert {unknown[0]!r} to weigh; there are: {', '.join(names)}"
        )
    found = np.asarray([weights.get(name, 0.0) for name in names], float)
    if not (np.isfinite(found).all() and (found >= 0).all() and found.sum() > 0):
        given = ", ".join(f"{name}={weight}" for name, weight in weights.items())
        raise UserError(f"weights must be at least 0 and one of them above; got {given}")
    with np.errstate(divide="ignore"):
        return np.log(found / found.sum())


def serving(registry: Registry, experts: Sequence[Expert]) -> dict[str, int]:
    """Language -> index of the expert that serves it."""
    names = [expert.name for expert in experts]
    tags = dict.fromkeys(tag for expert in experts for tag in expert.languages)
    return {tag: names.index(registry.for_language(tag).name) for tag in tags}


def pieces(run: Run) -> list[str]:
    """The characters of each id, as the `identifier` was fitted on them."""
    # A model may have rows of its embedding, and so give ids, that no text becomes.
    ids = list(range(read_config(run.seed).vocabulary_size))
    return [piece or "" for piece in run.tokenizer().hub.convert_ids_to_tokens(ids)]


def identifier(run: Run) -> Identifier:
    """What tells the languages of a RUN apart, those of grown experts too, by the pieces that its
    tokenizer cuts text into."""
    languages = _languages(run)

    def make(path: Path) -> Identifier:
        names = run.tokenizer().hub.convert_ids_to_tokens

        def texts(ids: LanguageIds, held_out: bool) -> Iterator[str]:
            for document in _some(ids, ids.order, held_out=held_out):
                yield "".join(names(document.tolist()))

        fitted = identify.fit({tag: texts(ids, False) for tag, ids in languages.items()})
        # Calibrated where it is needed: at the beginnings of texts.
        draw = np.random.default_rng(0)
        fitted = fitted.calibrated(
            {
                tag: (text[: int(draw.geometric(0.05))] for text in texts(ids, True))
                for tag, ids in languages.items()
            }
        )
        _kept(path, fitted.save)
        return fitted

    facts = [[tag, len(ids), len(ids.ids)] for tag, ids in languages.items()]
    return _fitted(run, "languages", facts, Identifier.load, make)


def _learned(run: Run, experts: Sequence[Expert]) -> Learned:
    """Logistic regression on TF-IDF vectors of beginnings of the experts' documents."""
    vectoriser = run.vectoriser()

    def make(path: Path) -> Mapping[str, np.ndarray]:
        from sklearn.linear_model import LogisticRegression

        draw, states, labels = np.random.default_rng(0), [], []
        for label, expert in enumerate(experts):
            for document in _documents_of(run, expert):
                # Of any length: short ones are what is hard.
                sums = np.cumsum(vectoriser.terms(np.asarray(document)), axis=0)
                drawn = [*draw.integers(1, len(document) + 1, 2), draw.geometric(0.1)]
                lengths = np.unique(np.minimum(drawn, len(document)))
                states += [sums[length - 1] for length in lengths]
                labels += [label] * len(lengths)
        features = Learned.features(np.asarray(states))
        model = LogisticRegression(C=100.0, max_iter=300, class_weight="balanced")
        model.fit(features, labels)
        weights, bias = np.asarray(model.coef_), np.asarray(model.intercept_)
        if len(experts) == 2:  # one row for both
            weights, bias = np.concatenate([-weights, weights]) / 2, np.append(-bias, bias) / 2
        arrays = {"weights": weights.T.astype(np.float32), "bias": bias.astype(np.float32)}
        _kept(path, lambda path: write_arrays(path, arrays))
        return arrays

    if len(experts) == 1:
        arrays: Mapping[str, np.ndarray] = {
            "weights": np.zeros((vectoriser.dimensions + 1, 1)),
            "bias": np.zeros(1),
        }
    else:
        facts = [[expert.reference, expert.sha256] for expert in experts]
        arrays = _fitted(run, "learned", facts, _read_learned, make)
    return Learned(vectoriser=vectoriser, weights=arrays["weights"], bias=arrays["bias"])


def _read_learned(path: Path) -> Mapping[str, np.ndarray]:
    arrays = read_arrays(path)
    if not {"weights", "bias"} <= set(arrays):
        raise UserError(f"{path} is damaged: it has {', '.join(arrays)}")
    return arrays


def _languages(run: Run) -> dict[str, LanguageIds]:
    """All languages that the RUN has text of: its corpus and what experts were grown on."""
    found = dict(run.store().languages)
    for expert in run.registry().published():
        for source in _sources(run, expert):
            found.setdefault(source.ids.language, source.ids)
    return found


def _sources(run: Run, expert: Expert) -> list[Source]:
    """The documents that are an expert's own."""
    if expert.cluster is not None:
        return cluster_sources(run, expert.cluster)
    own = [run.store() if tag in run.languages else run.store(tag) for tag in expert.languages]
    return [
        Source(ids=store.languages[tag], share=1.0) for tag, store in zip(expert.languages, own)
    ]


def _documents_of(run: Run, expert: Expert) -> Iterable[np.ndarray]:
    sources = _sources(run, expert)
    for source in sources:
        numbers = source.ids.order
        if source.documents is not None:
            numbers = numbers[np.isin(numbers, source.documents)]
        yield from _some(source.ids, numbers, tokens=FITTED_TOKENS // len(sources))


def _some(
    ids: LanguageIds,
    numbers: np.ndarray,
    *,
    tokens: int = FITTED_TOKENS,
    held_out: bool | None = None,
) -> Iterator[np.ndarray]:
    """Documents that are not empty, in this order, of so many tokens at most; those held out, the
    others, or (None) all."""
    for place, number in enumerate(numbers):
        if held_out not in (None, place % _HELD_OUT == _HELD_OUT - 1):
            continue
        document = ids.document(int(number))[:tokens]
        tokens -= len(document)
        if len(document):
            yield document
        if tokens <= 0:
            return


def _fitted(
    run: Run,
    name: str,
    facts: object,
    load: Callable[[Path], T],
    make: Callable[[Path], T],
) -> T:
    """What is in RUN/routers, made from these facts; otherwise what `make` makes and keeps."""
    origin = [_FORMAT, run.registry().seed_sha256, run.record.get("corpus_sha256"), facts]
    key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:12]
    path = run.directory / "routers" / f"{name}-{key}.npz"
    if path.exists():
        try:
            if manifest.is_recorded(run.directory, f"routers/{path.name}"):
                return load(path)
            print(f"{path} was changed since it was fitted; it is fitted again", file=sys.stderr)
        except UserError as error:
            print(f"{error}; it is fitted again", file=sys.stderr)
    return make(path)


def _kept(path: Path, save: Callable[[Path], object]) -> None:
    """Saves it in the place of those made from other facts, where that can be."""
    try:
        path.parent.mkdir(exist_ok=True)
        save(path)
        for other in path.parent.glob(f"{path.stem.rpartition('-')[0]}-*.npz"):
            if other != path:
                other.unlink(missing_ok=True)  # who made another at the same time may be first
        manifest.record(path.parent.parent, [f"routers/{path.name}"], again=True)
    except (OSError, UserError) as error:
        print(f"{path} cannot be kept ({error}); it is fitted each time", file=sys.stderr)
