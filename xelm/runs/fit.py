"""Models that routers need, fitted on the text of a RUN and kept in RUN/routers.

The name of each file has a hash of what it was made from. When an expert is added, only what
depends on the experts is fitted again.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from clustering import identify, novelty
from clustering.errors import UserError
from clustering.files import read_arrays, write_arrays
from clustering.identify import Identifier
from clustering.novelty import Novelty
from clustering.vectoriser import Vectoriser
from experts import manifest
from experts.expert import Expert
from xelm.data.held_out import divide
from xelm.data.rows import LanguageShare
from xelm.data.store import TokenizedLanguage
from xelm.data.tokenizer import Tokenizer
from xelm.inference.routers import Learned
from xelm.models.checkpoint import read_config
from xelm.runs.columns import PENALTY, added_columns
from xelm.runs.run import Run
from xelm.runs.shares import all_languages, expert_text

FITTED_TOKENS = 300_000
"""Largest number of tokens of each language or expert to fit on; more change little."""
_FORMAT = 3
"""Version of the fits; raised when the same facts give another fit."""
_HELD_OUT = 10
"""One document in so many is held out, to calibrate the fit; of fewer documents, one."""

T = TypeVar("T")


def pieces(run: Run) -> list[str]:
    """The characters of each id, on which the `identifier` is fitted."""
    return _pieces(run.tokenizer(), read_config(run.seed).vocabulary_size)


@functools.lru_cache(maxsize=2)  # a second for a quarter of a million ids, and each router has them
def _pieces(tokenizer: Tokenizer, size: int) -> list[str]:
    # A model may have rows of its embedding, and so give ids, that no text becomes.
    return [piece or "" for piece in tokenizer.hub.convert_ids_to_tokens(list(range(size)))]


def identifier(run: Run, *, keep: bool = True) -> Identifier:
    """The language identifier of a RUN, by the subwords of its tokenizer; it knows the languages of
    the corpus and of grown experts. keep: whether it is kept in the RUN if it is fitted now.

    A RUN without its text has that which was fitted before, and learns the languages of later text
    on its own; UserError if it has none."""
    languages = _languages(run)

    def texts(stores: Sequence[TokenizedLanguage], held_out: bool) -> Iterator[str]:
        names = run.tokenizer().hub.convert_ids_to_tokens
        for document in documents_to_fit(run, stores, held_out):
            yield "".join(names(document.tolist()))

    if not run.has_text:
        kept = _kept(run, "languages", Identifier.load)
        new = {tag: some for tag, some in languages.items() if tag not in kept.languages}
        more = identify.fit({tag: texts(some, False) for tag, some in new.items()}) if new else None
        return kept if more is None else kept.joined(more)

    def make() -> Identifier:
        fitted = identify.fit({tag: texts(some, False) for tag, some in languages.items()})
        # Calibrated where it is needed: at the beginnings of texts.
        draw = np.random.default_rng(0)
        held_out = {tag: texts(some, True) for tag, some in languages.items()}
        return fitted.calibrated(
            {t: (x[: int(draw.geometric(0.05))] for x in some) for t, some in held_out.items()}
        )

    facts = _sizes(languages)
    return _fitted(run, "languages", facts, make, Identifier.save, Identifier.load, keep=keep)


def _sizes(languages: Mapping[str, Sequence[TokenizedLanguage]]) -> list[list[object]]:
    """Sizes of the text of each language, by which a change of the text is noticed at no cost."""
    return [
        [tag, *(size for ids in some for size in (len(ids), len(ids.ids)))]
        for tag, some in languages.items()
    ]


def novelty_of(run: Run, served: Collection[str], *, keep: bool = True) -> Novelty | None:
    """The detector of texts in languages that no expert serves; None where too few languages are
    served to fit it, or too few of them have a document that can be held out, which is printed on
    stderr. served: canonical tags; empty for clusters of documents, where all languages of the RUN
    count as served. keep: as in `identifier`. A RUN without its text has that which was fitted
    before, or none."""
    if not run.has_text:
        if not _files_of(run, "novelty"):
            return None
        load = partial(Novelty.load, identifier=identifier(run))
        return _kept(run, "novelty", load)
    languages = _languages(run)
    known = [tag for tag in languages if tag in (served or languages)]
    if len(known) < novelty.FEWEST:
        return None
    held_out = [
        tag for tag in known if sum(np.count_nonzero(ids.lengths) for ids in languages[tag]) > 1
    ]
    if len(held_out) < novelty.FEWEST:
        print(
            f"{len(held_out)} of the languages that the experts of {run.directory} know have two "
            f"documents or more; wanted {novelty.FEWEST} to learn what an unknown language looks "
            "like: no text counts as one",
            file=sys.stderr,
        )
        return None
    found = identifier(run, keep=keep)

    def make() -> Novelty:
        texts = {tag: documents_to_fit(run, languages[tag], False) for tag in known}
        others = {tag: documents_to_fit(run, some, True) for tag, some in languages.items()}
        return novelty.fit(found, known, pieces(run), texts, others)

    facts = [known, _sizes(languages), novelty.SHORT, novelty.MOST_FALSE]
    load = partial(Novelty.load, identifier=found)
    return _fitted(run, "novelty", facts, make, Novelty.save, load, keep=keep)


def learned(run: Run, experts: Sequence[Expert], *, keep: bool = True) -> Learned:
    """The learned router: logistic regression on TF-IDF vectors of beginnings of documents.

    Where it was fitted for most of these experts before, their columns stay as they are to the bit,
    and only those of the others are fitted; the column of an expert that is not in use any more is
    left out. keep: as in `identifier`; what is fitted for other experts than those in use, which
    may have changed since a command began, takes the place of nothing."""
    in_use = {expert.reference for expert in run.registry().published()}
    keep = keep and in_use >= {expert.reference for expert in experts}
    vectoriser, names = run.vectoriser(), [_identity(expert) for expert in experts]

    def make() -> Mapping[str, np.ndarray]:
        before = _learned_before(run)
        known = [number for number, name in enumerate(names) if name in before]
        weights = np.zeros((vectoriser.dimensions + 1, 0), np.float32)
        bias = np.zeros(0, np.float32)
        if known:
            columns = [before[names[number]] for number in known]
            weights, bias = (
                np.stack([c[:-1] for c in columns], 1),
                np.array([c[-1] for c in columns]),
            )
        if len(known) < len(names):
            # The products are small: threads that wait for each other, or for a model that is
            # served at the same time, take up to forty times as long.
            with threadpool_limits(1):
                features, labels = examples(run, experts)
                if len(known) < max(2, len(names) / 2):
                    weights, bias = all_columns(features, labels)
                else:
                    print(f"the columns of {len(known)} experts stay as they are", file=sys.stderr)
                    weights, bias = added_columns(
                        features, labels, known, weights, bias, len(names)
                    )
        return {"weights": weights, "bias": bias, "experts": np.array(names)}

    def save(arrays: Mapping[str, np.ndarray], path: Path) -> None:
        write_arrays(path, arrays)

    if len(experts) == 1:
        arrays = {"weights": np.zeros((vectoriser.dimensions + 1, 1)), "bias": np.zeros(1)}
    else:
        facts = [[expert.first_reference, expert.sha256] for expert in experts]
        arrays = _fitted(run, "learned", facts, make, save, _read_learned, keep=keep)
    return Learned(vectoriser=vectoriser, weights=arrays["weights"], bias=arrays["bias"])


def _identity(expert: Expert) -> str:
    """Name of an expert's column, which stays when it is renamed."""
    files = json.dumps(expert.sha256, sort_keys=True).encode()
    return f"{expert.first_reference} {hashlib.sha256(files).hexdigest()}"


def _learned_before(run: Run) -> dict[str, np.ndarray]:
    """Identity of each expert -> its column of the learned router, weights and then bias, as they
    were fitted last; empty if none were."""
    files = list((run.directory / "routers").glob("learned-*.npz"))
    for path in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        with suppress(UserError):
            if manifest.is_recorded(run.directory, f"routers/{path.name}"):
                arrays = _read_learned(path)
                # Before they were recorded, nobody knew whose the columns were.
                names = arrays.get("experts", np.array([])).tolist()
                columns = np.concatenate([arrays["weights"], arrays["bias"][None]])
                return dict(zip(names, columns.T))
    return {}


def examples(run: Run, experts: Sequence[Expert]) -> tuple[np.ndarray, np.ndarray]:
    """Features of beginnings of documents, [N, D1], and the index of the expert of each, [N]."""
    vectoriser, draw = run.vectoriser(), np.random.default_rng(0)
    states, labels = [], []
    for label, expert in enumerate(experts):
        for document in _documents_of(run, expert):
            sums = _beginnings(vectoriser, document, draw)
            states.append(sums)
            labels += [label] * len(sums)
    return Learned.features(np.concatenate(states)), np.array(labels)


def all_columns(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights, [D1, E], and bias, [E], of logistic regression over all experts that `labels`
    name."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=PENALTY, max_iter=300, class_weight="balanced")
    model.fit(features, labels)
    weights, bias = np.asarray(model.coef_), np.asarray(model.intercept_)
    if len(bias) == 1:  # one row for both
        weights, bias = np.concatenate([-weights, weights]) / 2, np.append(-bias, bias) / 2
    return weights.T.astype(np.float32), bias.astype(np.float32)


def _beginnings(
    vectoriser: Vectoriser, document: np.ndarray, draw: np.random.Generator
) -> np.ndarray:
    """Summed vectors of a few beginnings of a document, [few, D]; short ones are among them, since
    they are the hardest."""
    drawn = [*draw.integers(1, len(document) + 1, 2), draw.geometric(0.1)]
    lengths = np.unique(np.minimum(drawn, len(document)))
    parts = np.split(np.asarray(document), lengths)[:-1]
    return np.cumsum(vectoriser.sums(parts), axis=0)


def _read_learned(path: Path) -> Mapping[str, np.ndarray]:
    arrays = read_arrays(path)
    if not {"weights", "bias"} <= set(arrays):
        raise UserError(f"{path} is damaged: it has {', '.join(arrays)}")
    return arrays


def _languages(run: Run) -> dict[str, list[TokenizedLanguage]]:
    """Text of every language: that of the RUN's corpus, and what experts were trained on beside."""
    return run.texts(all_languages(run))


def documents_to_fit(
    run: Run, stores: Sequence[TokenizedLanguage], held_out: bool
) -> Iterator[np.ndarray]:
    """Documents of one language, from all its stores, that routers are fitted on, or that are held
    out of the fit to calibrate it; none that is held out of all training."""
    most = FITTED_TOKENS // len(stores)
    whole = [LanguageShare(ids=ids, share=1.0) for ids in stores]
    for source in divide(whole, run.config.held_out).sources:
        numbers = source.ids.order
        if source.documents is not None:
            numbers = numbers[np.isin(numbers, source.documents)]
        yield from _some(source.ids, numbers, tokens=most, held_out=held_out)


def _documents_of(run: Run, expert: Expert) -> Iterable[np.ndarray]:
    sources = expert_text(run, expert).sources
    for source in sources:
        numbers = source.ids.order
        if source.documents is not None:
            numbers = numbers[np.isin(numbers, source.documents)]
        yield from _some(source.ids, numbers, tokens=FITTED_TOKENS // len(sources))


def _some(
    ids: TokenizedLanguage,
    numbers: np.ndarray,
    *,
    tokens: int = FITTED_TOKENS,
    held_out: bool | None = None,
) -> Iterator[np.ndarray]:
    """Documents that are not empty, in the order of `numbers`, up to so many tokens. held_out: only
    those held out (at least one where there are two), only the others, or (None) all."""
    numbers = numbers[ids.lengths[numbers] > 0]
    # A single document is not held out: there would be none left to fit on.
    every = min(_HELD_OUT, max(2, len(numbers)))
    for place, number in enumerate(numbers):
        if held_out not in (None, place % every == every - 1):
            continue
        document = ids.document(int(number))[:tokens]
        tokens -= len(document)
        yield document
        if tokens <= 0:
            return


def _files_of(run: Run, name: str) -> list[Path]:
    return sorted((run.directory / "routers").glob(f"{name}-*.npz"))


def _kept(run: Run, name: str, load: Callable[[Path], T]) -> T:
    """The fit of this name in a RUN that has no text to fit it again; UserError if it is not there,
    or is not as it was recorded."""
    files = _files_of(run, name)
    if len(files) != 1 or not manifest.is_recorded(run.directory, f"routers/{files[0].name}"):
        raise UserError(
            f"{run.directory}/routers has no whole {name}-*.npz, and the RUN has no text to fit it "
            "on; use --routing posterior"
        )
    return load(files[0])


def _fitted(
    run: Run,
    name: str,
    facts: object,
    make: Callable[[], T],
    save: Callable[[T, Path], object],
    load: Callable[[Path], T],
    *,
    keep: bool = True,
) -> T:
    """The fit in RUN/routers that was made from these facts, or else what `make` makes, which is
    saved in place of fits from other facts if `keep`; where that is impossible, a line on stderr
    says so."""
    origin = [_FORMAT, run.registry().seed_sha256, run.record.get("corpus_sha256"), facts]
    key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:12]
    path = run.directory / "routers" / f"{name}-{key}.npz"
    if path.exists():
        try:
            if manifest.is_recorded(run.directory, f"routers/{path.name}"):
                return load(path)
            print(f"{path} is not as it was recorded; it is fitted again", file=sys.stderr)
        except UserError as error:
            print(f"{error}; it is fitted again", file=sys.stderr)
    if not keep:
        return make()
    print(f"fitting {path}, once for these experts", file=sys.stderr, flush=True)
    fitted = make()
    try:
        manifest.write(run.directory, f"routers/{path.name}", partial(save, fitted))
        for other in path.parent.glob(f"{name}-*.npz"):
            if other != path:
                other.unlink(missing_ok=True)  # another process may have deleted it
    except (OSError, UserError) as error:
        print(f"{path} cannot be written ({error}); it is fitted each time", file=sys.stderr)
    return fitted
