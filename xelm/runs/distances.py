"""Distances between languages by name of the measure, from what a user has: URIEL, a table, a
corpus, a tagged corpus, a RUN.

Knows which measure needs which of them, and that several measures are weighed together. How each is
measured is in `clustering`.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from clustering import genealogy, geography, internal, lexical, table, typology
from clustering.distances import Distances, combine
from clustering.errors import UserError
from clustering.files import sha256
from clustering.languages import canonical_all
from xelm.data import corpus as corpora
from xelm.data import tagged
from xelm.data.corpus import AnyCorpus, Corpus, Faults
from xelm.runs.results import RESULTS, read_results
from xelm.runs.run import Run

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What measures may be made of; each is wanted by some of them alone."""

    features: str = "syntax_average"
    """Sets of URIEL, joined by `+`; for typology."""
    only: Sequence[str] = ()
    """Names of features; for typology and table. All if empty."""
    table: str | Path | None = None
    """CSV file; for table."""
    corpus: AnyCorpus | None = None
    """Text by language; for words and characters."""
    run: Run | None = None
    """For subwords and losses; and for words and characters where no corpus is given."""
    tagged: str | Path | None = None
    """Folder of CoNLL-U files; for names."""
    states: str | Path | None = None
    """File of `xelm features`; for states and alignment."""
    updates: str | Path | None = None
    """File of `xelm features --of updates`; for updates."""
    layer: int | None = None
    """Of the model; for states and alignment, where None takes the middle one, and for updates,
    where it takes the last three."""
    documents: int = 10_000
    """At most so many of each language are counted."""
    resample: int | None = None
    """Random seed by which features are drawn anew; for typology and table."""


def measured(spec: str, languages: Sequence[str] | None, sources: Sources) -> Distances:
    """Distances by a measure, or by several as in `typology:.7+genealogy:.3`; without weights all
    weigh the same. languages: None takes those of the table, corpus or RUN. UserError for an
    unknown measure or weight, and where a source or languages are missing."""
    parts = _parts(spec)
    if languages is None:
        languages = languages_of(spec, sources)
    found = [(MEASURES[name](languages, sources), weight) for name, weight in parts]
    return found[0][0] if len(found) == 1 else combine(found)


def resampled(
    spec: str, languages: Sequence[str], sources: Sources, count: int
) -> Iterator[Distances]:
    """The same with features drawn anew with replacement, `count` times; nothing if no measure has
    features. Draws that leave a pair with nothing in common are passed over, as many again at
    most."""
    if not {"typology", "table"} & set(measures_of(spec)):
        return
    for seed in range(2 * count):
        try:
            found = measured(spec, languages, replace(sources, resample=seed))
        except UserError:
            continue
        yield found
        count -= 1
        if not count:
            return


def measures_of(spec: str) -> list[str]:
    """Names of the measures that `measured` would weigh; UserError as there."""
    return [name for name, _ in _parts(spec)]


def _parts(spec: str) -> list[tuple[str, float]]:
    parts = [_part(text) for text in spec.split("+")]
    names = [name for name, _ in parts]
    if len(set(names)) < len(names):
        raise UserError(f"each measure once; got {spec}")
    return parts


def _part(text: str) -> tuple[str, float]:
    name, colon, given = text.strip().partition(":")
    if name not in MEASURES:
        raise UserError(f"unknown measure {name!r}; there are {', '.join(MEASURES)}")
    try:
        weight = float(given) if colon else 1.0
    except ValueError:
        raise UserError(f"a number wanted for the weight of {name}; got {given!r}") from None
    if not 0 < weight < math.inf:
        raise UserError(f"weights must be above zero; got {given} for {name}")
    return name, weight


def languages_of(spec: str, sources: Sources) -> Sequence[str]:
    """Those of the table, tagged text or states that the measures are made of, or else of the
    corpus or RUN; UserError if there is none of these."""
    measures = measures_of(spec)
    if "table" in measures:
        return table.read(_given(sources.table, "table", "--table"))[0]
    if "names" in measures:
        return list(tagged.files(_given(sources.tagged, "names", "--tagged")))
    for measure in ("states", "alignment"):
        if measure in measures:
            return internal.States.load(_given(sources.states, measure, "--states")).languages
    if "updates" in measures:
        return internal.Updates.load(_given(sources.updates, "updates", "--updates")).languages
    if sources.corpus:
        return corpora.languages_of(sources.corpus)
    if sources.run:
        return sources.run.languages
    raise UserError("name the languages with --languages, --corpus or --run")


def _typology(languages: Sequence[str], sources: Sources) -> Distances:
    return typology.distances(languages, sources.features, sources.only, resample=sources.resample)


def _table(languages: Sequence[str], sources: Sources) -> Distances:
    path = _given(sources.table, "table", "--table")
    return table.distances(path, languages, only=sources.only, resample=sources.resample)


def _text(
    measure: str, count: Callable[[Iterator[str]], Mapping[str, int]]
) -> Callable[[Sequence[str], Sources], Distances]:
    def distances(languages: Sequence[str], sources: Sources) -> Distances:
        corpus = sources.corpus or (sources.run and sources.run.record["corpus"])
        corpus = Corpus.of(_given(corpus, measure, "--corpus or --run")).pinned()
        tags, faults = canonical_all(languages), Faults()
        counts = {}
        for tag in tags:
            documents = corpora.read(corpus, faults, [tag])
            texts = (document.text for document in documents if document.language == tag)
            counts[tag] = count(itertools.islice(texts, sources.documents))
        silent = [tag for tag, found in counts.items() if not found]
        if silent:
            raise corpora.no_documents(silent, faults)
        if faults:
            print(f"{corpus}: {faults}", file=sys.stderr)
        made_from = {"corpus": corpora.fingerprint(corpus, tags)}
        found = lexical.text_distances(counts, measure, made_from)
        facts = {"most_documents": sources.documents, "records_left_out": faults.to_json()}
        return replace(found, parameters=found.parameters | facts)

    return distances


def _subwords(languages: Sequence[str], sources: Sources) -> Distances:
    run = _given(sources.run, "subwords", "--run")
    store, counts = run.store(), {}
    for tag in canonical_all(languages):
        if tag not in store.languages:
            raise UserError(f"{run.directory} has no text in {tag}")
        ids = store.languages[tag]
        count = min(len(ids), sources.documents)
        counts[tag] = lexical.subwords(ids.document(number) for number in range(count))
    made_from = {"corpus": store.record["corpus_sha256"]}
    return lexical.text_distances(counts, "subwords", made_from)


def _names(languages: Sequence[str], sources: Sources) -> Distances:
    folder = _given(sources.tagged, "names", "--tagged")
    tags, found = canonical_all(languages), tagged.files(folder)
    missing = [tag for tag in tags if tag not in found]
    if missing:
        raise UserError(f"{folder} has no tagged text in {', '.join(missing)}")
    counts = {tag: lexical.names(tagged.proper_nouns(found[tag])) for tag in tags}
    return lexical.type_distances(counts, "names", tagged.made_from(found[tag] for tag in tags))


def _internal(
    measure: str, distances: Callable[..., Distances]
) -> Callable[[Sequence[str], Sources], Distances]:
    return lambda languages, sources: distances(
        _given(sources.states, measure, "--states"), languages, sources.layer
    )


def _updates(languages: Sequence[str], sources: Sources) -> Distances:
    path = _given(sources.updates, "updates", "--updates")
    return internal.updates(path, languages, sources.layer)


def _losses(languages: Sequence[str], sources: Sources) -> Distances:
    run, tags = _given(sources.run, "losses", "--run"), canonical_all(languages)
    experts = {e.languages[0]: e.name for e in run.registry().published() if len(e.languages) == 1}
    missing = [tag for tag in tags if tag not in experts]
    if missing:
        raise UserError(
            f"losses are between experts of one language each; {run.directory} has none of "
            f"{', '.join(missing)} alone"
        )
    path = run.results / RESULTS
    found = {(row.system, row.language): row.nll / row.tokens for row in read_results(run).rows}
    pairs = [(one, other) for one in tags for other in tags]
    unknown = [pair for pair in pairs if (experts[pair[0]], pair[1]) not in found]
    if unknown:
        raise UserError(
            f"{path} has no loss of the expert of {unknown[0][0]} on {unknown[0][1]}; run xelm "
            "evaluate on text of all of them, with another routing than by language alone"
        )
    nats = np.array([found[experts[one], other] for one, other in pairs])
    return internal.losses(tags, nats.reshape(len(tags), -1), {path.name: sha256(path)})


def _given(source: Item | None, measure: str, option: str) -> Item:
    if source is None:
        raise UserError(f"the measure {measure} needs {option}")
    return source


Measure = Callable[[Sequence[str], Sources], Distances]

MEASURES: Mapping[str, Measure] = {
    "typology": _typology,
    "genealogy": lambda languages, sources: genealogy.distances(languages),
    "geography": lambda languages, sources: geography.distances(languages),
    "table": _table,
    "words": _text("words", lexical.words),
    "characters": _text("characters", lexical.characters),
    "subwords": _subwords,
    "names": _names,
    "states": _internal("states", internal.cosine),
    "alignment": _internal("alignment", internal.alignment),
    "updates": _updates,
    "losses": _losses,
}
