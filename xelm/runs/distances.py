"""Distances between languages by name of the measure, from what a user has: URIEL, a table, a
corpus, a tagged corpus, a RUN.

Knows which measure needs which of them, and that several measures are weighed together. How each is
measured is in `clustering`.
"""

import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from clustering import genealogy, geography, internal, lexical, table, typology
from clustering.distances import Distances, combine
from clustering.errors import UserError
from clustering.files import sha256
from clustering.languages import canonical_all
from xelm.data import conllu
from xelm.data import contents as corpora
from xelm.data.contents import Contents, contents_of
from xelm.data.corpus import AnyCorpus, Corpus
from xelm.data.parts import Document, no_documents
from xelm.data.unusable import UnusableRecords
from xelm.runs.measures import MEASURES, Data
from xelm.runs.results import RESULTS, read_results
from xelm.runs.run import Run

Item = TypeVar("Item")

MIXTURE = {"genealogy": 0.6, "typology": 0.2, "geography": 0.2, "subwords": 0.2}
"""Weights of what `mixture` is made of. Families decide where there is one; where there is none,
grammar, neighbourhood and shared text do. `benchmarks/parents.py` compares other weights."""
_MOST_DOCUMENTS = 1000
"""Largest number of documents of each language whose subwords `mixture` counts, since every growth
measures it."""
_HELD_CHARACTERS = 2**22
"""Text that is read before it is counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources(Data):
    """Data that measures read; each is needed by some of them alone."""

    corpus: AnyCorpus | None = None
    """Text by language, for words and characters; and for subwords and mixture in a RUN, for the
    languages of which the RUN has none."""
    run: Run | None = None
    """RUN for subwords, losses and mixture; and for words and characters without a corpus."""
    documents: int = 10_000
    """Largest number of documents of each language that are counted."""
    resample: int | None = None
    """Random seed by which features are resampled, for typology and table."""


def measured(spec: str, languages: Sequence[str] | None, sources: Sources) -> Distances:
    """Distances by a measure, or by several as in `typology:.7+genealogy:.3`; without weights all
    weigh the same. languages: None takes those of the table, corpus or RUN. Pairs and languages of
    which a measure knows nothing are at an unknown distance. UserError for an unknown measure or
    weight, where a source or languages are missing, and where a table, text or file has none of
    the languages."""
    tags = canonical_all(languages_of(spec, sources) if languages is None else languages)
    found = [(_distances(name, tags, sources), weight) for name, weight in _parts(spec)]
    return found[0][0] if len(found) == 1 else combine(found)


def resampled(
    spec: str, languages: Sequence[str], sources: Sources, count: int
) -> Iterator[Distances]:
    """The same with features drawn anew with replacement, `count` times; nothing if no measure has
    features. Draws that leave a pair with nothing in common are passed over, as many again at
    most."""
    if not any(name in ("typology", "table", "mixture") for name, _ in _parts(spec)):
        return
    for seed in range(2 * count):
        try:
            found = measured(spec, languages, replace(sources, resample=seed)).complete()
        except UserError:
            continue
        yield found
        count -= 1
        if not count:
            return


def _parts(spec: str) -> list[tuple[str, float]]:
    """Name and weight of each measure."""
    parts = []
    for text in spec.split("+"):
        name, colon, given = text.strip().partition(":")
        if name not in MEASURES:
            raise UserError(f"unknown measure {name!r}; there are {', '.join(MEASURES)}")
        try:
            weight = float(given) if colon else 1.0
        except ValueError:
            raise UserError(f"a number wanted for the weight of {name}; got {given!r}") from None
        if not 0 < weight < math.inf:
            raise UserError(f"weights must be above zero; got {given} for {name}")
        parts.append((name, weight))
    if len({name for name, _ in parts}) < len(parts):
        raise UserError(f"each measure once; got {spec}")
    return parts


def languages_of(spec: str, sources: Sources) -> Sequence[str]:
    """Languages of the table, tagged text or states that the measures are made of, or else of the
    corpus or RUN; UserError if there is none of these."""
    measures = [name for name, _ in _parts(spec)]
    if "table" in measures:
        return table.read(_given(sources.table, "table", "--table"))[0]
    if "names" in measures:
        return list(conllu.files(_given(sources.tagged, "names", "--tagged")))
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


def _distances(measure: str, languages: Sequence[str], sources: Sources) -> Distances:
    """Distances by one of `MEASURES`."""
    features, only, layer = sources.features or "syntax_average", sources.only, sources.layer
    match measure:
        case "mixture":
            return _mixture(languages, sources)
        case "typology":
            return typology.distances(languages, features, only, resample=sources.resample)
        case "genealogy":
            return genealogy.distances(languages)
        case "geography":
            return geography.distances(languages)
        case "table":
            path = _given(sources.table, measure, "--table")
            return table.distances(path, languages, only=only, resample=sources.resample)
        case "words":
            return _text(measure, lexical.words, languages, sources)
        case "characters":
            return _text(measure, lexical.characters, languages, sources)
        case "subwords":
            return _subwords(languages, sources)
        case "names":
            return _names(languages, sources)
        case "states":
            return internal.cosine(_given(sources.states, measure, "--states"), languages, layer)
        case "alignment":
            path = _given(sources.states, measure, "--states")
            return internal.alignment(path, languages, layer)
        case "updates":
            path = _given(sources.updates, measure, "--updates")
            return internal.updates(path, languages, layer)
        case "losses":
            return _losses(languages, sources)
    raise AssertionError(f"{measure} is in MEASURES alone")


def _mixture(languages: Sequence[str], sources: Sources) -> Distances:
    filled = replace(sources, features=sources.features or "syntax_knn")
    names = ("genealogy", "typology", "geography")
    parts = [(_distances(name, languages, filled), MIXTURE[name]) for name in names]
    if sources.run is not None:
        few = replace(sources, documents=min(sources.documents, _MOST_DOCUMENTS))
        counts, made_from = _subwords_of(sources.run, languages, few)
        if len(counts) > 1:
            shared = lexical.text_distances(counts, "subwords", made_from).spread(languages)
            parts.append((shared, MIXTURE["subwords"]))
    return replace(combine(parts), measure="mixture")


def _text(
    measure: str,
    count: Callable[[list[str]], Mapping[str, int]],
    languages: Sequence[str],
    sources: Sources,
) -> Distances:
    corpus = sources.corpus or (sources.run and sources.run.record["corpus"])
    corpus = Corpus.of(_given(corpus, measure, "--corpus or --run")).pinned()
    contents, unusable = contents_of(corpus), UnusableRecords()
    counts = _counted(contents, languages, sources.documents, count, unusable)
    if not counts:
        raise no_documents(languages, unusable)
    if unusable:
        print(f"{corpus}: {unusable}", file=sys.stderr)
    found = lexical.text_distances(counts, measure, {"corpus": contents.fingerprint(list(counts))})
    facts = {"most_documents": sources.documents, "records_left_out": unusable.to_json()}
    return replace(found, parameters=found.parameters | facts).spread(languages)


def _counted(
    contents: Contents,
    languages: Sequence[str],
    documents: int,
    count: Callable[[list[str]], Mapping[Any, int]],
    unusable: UnusableRecords,
) -> dict[str, lexical.Counts]:
    """What `count` finds in the first `documents` texts of each language, summed in one reading of
    the corpus; languages in which nothing is found are left out."""
    counts: dict[str, Counter] = {tag: Counter() for tag in languages}
    for tag, texts in _pieces(contents.first_documents(languages, documents, unusable)):
        counts[tag].update(count(texts))
    return {tag: found for tag, found in counts.items() if found}


def _pieces(documents: Iterable[Document]) -> Iterator[tuple[str, list[str]]]:
    """Language and texts of documents that come in any order, each language's in its own order,
    while no more than `_HELD_CHARACTERS` and one document are in memory."""
    held: dict[str, list[str]] = {}
    characters = 0
    for document in documents:
        held.setdefault(document.language, []).append(document.text)
        characters += len(document.text)
        if characters >= _HELD_CHARACTERS:
            yield from held.items()
            held, characters = {}, 0
    yield from held.items()


def _subwords(languages: Sequence[str], sources: Sources) -> Distances:
    run = _given(sources.run, "subwords", "--run")
    counts, made_from = _subwords_of(run, languages, sources)
    if not counts:
        raise UserError(f"{run.directory} has no text in {', '.join(languages[:5])}")
    return lexical.text_distances(counts, "subwords", made_from).spread(languages)


def _subwords_of(
    run: Run, languages: Sequence[str], sources: Sources
) -> tuple[dict[str, lexical.Counts], dict[str, str]]:
    """Subwords of the languages of which the RUN, or else the corpus, has text; and what was
    read."""
    counts: dict[str, lexical.Counts] = {}
    made_from: dict[str, str] = {}
    for tag, texts in run.texts(languages).items():
        documents = (ids.document(number) for ids in texts for number in range(len(ids)))
        counts[tag] = lexical.subwords(itertools.islice(documents, sources.documents))
    for name, store in run.stores(languages).items():
        made_from["corpus" if name == "train" else name] = store.record["corpus_sha256"]
    missing = [tag for tag in languages if tag not in counts]
    if sources.corpus and missing:
        contents, tokenizer = contents_of(sources.corpus), run.tokenizer()

        def count(texts: list[str]) -> lexical.Counts:
            return lexical.subwords(map(np.asarray, tokenizer.encode(texts)))

        more = _counted(contents, missing, sources.documents, count, UnusableRecords())
        if more:
            made_from["further corpus"] = contents.fingerprint(list(more))
        counts |= more
    return {tag: counts[tag] for tag in languages if counts.get(tag)}, made_from


def _names(languages: Sequence[str], sources: Sources) -> Distances:
    folder = _given(sources.tagged, "names", "--tagged")
    found = conllu.files(folder)
    tags = [tag for tag in languages if tag in found]
    counts = {tag: lexical.names(conllu.proper_nouns(found[tag])) for tag in tags}
    counts = {tag: names for tag, names in counts.items() if names}
    if not counts:
        raise UserError(f"{folder} has no names in {', '.join(languages[:5])}")
    made_from = conllu.made_from(path for tag in counts for path in found[tag])
    return lexical.type_distances(counts, "names", made_from).spread(languages)


def _losses(languages: Sequence[str], sources: Sources) -> Distances:
    run = _given(sources.run, "losses", "--run")
    experts = {e.languages[0]: e.name for e in run.registry().published() if len(e.languages) == 1}
    alone = [tag for tag in languages if tag in experts]
    if not alone:
        raise UserError(
            f"losses are between experts of one language each; {run.directory} has none of "
            f"{', '.join(languages[:5])} alone"
        )
    path = run.results / RESULTS
    found = {(row.system, row.language): row.nll / row.tokens for row in read_results(run).rows}
    for one, other in itertools.product(alone, repeat=2):
        if (experts[one], other) not in found:
            raise UserError(
                f"{path} has no loss of the expert of {one} on {other}; run xelm evaluate on text "
                "of all of them, with another routing than by language alone"
            )
    nats = np.array([[found[experts[one], other] for other in alone] for one in alone])
    return internal.losses(alone, nats, {path.name: sha256(path)}).spread(languages)


def _given(source: Item | None, measure: str, option: str) -> Item:
    if source is None:
        raise UserError(f"the measure {measure} needs {option}")
    return source
