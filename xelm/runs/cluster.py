"""Clusters of languages or documents from what a user has: measures, corpora and RUNs.

The methods are in `clustering`; each is given its data here.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clustering import choice, grouping, ngrams, tfidf, uriel
from clustering.clustering import Clustering
from clustering.documents import Documents
from clustering.engines import Engine
from clustering.errors import UserError
from clustering.languages import canonical_all, without
from xelm.data.contents import contents_of
from xelm.data.corpus import AnyCorpus, Corpus
from xelm.data.parts import Survey, no_documents
from xelm.data.reading import Reading
from xelm.data.unusable import UnusableRecords
from xelm.runs.distances import Sources, languages_of, measured, resampled
from xelm.runs.run import Run

RESAMPLINGS = 100
"""Number of resamplings of the features by which a number of clusters is assessed."""


def by_measure(
    measure: str,
    k: int | None,
    sources: Sources,
    *,
    languages: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    rule: str = "pairs",
    balance_tokens: bool = False,
) -> Clustering:
    """Clusters languages by a measure, or by several as in `typology:.7+genealogy:.3`.

    k: number of clusters; None chooses it, and the reason is among the clustering's parameters.
    languages: None takes those of the table, tagged text, corpus or RUN. exclude: languages to
    leave unassigned, as are those that the measure knows too little of. rule: one of
    `grouping.RULES`. balance_tokens: whether the rule balanced divides the RUN's tokens evenly.
    UserError if fewer than two languages can be compared, and as `measured`, `grouping.cluster`.
    """
    grouping.check_rule(rule)  # before a corpus is read
    tags, unassigned = without(languages or languages_of(measure, sources), exclude)
    distances = measured(measure, tags, sources)
    known, unknown = distances.without_gaps()
    if len(known.languages) < min(2, len(distances.languages)):
        distances.complete()
    sizes, why = None, {}
    if balance_tokens:
        if sources.run is None:
            raise UserError("the tokens to balance are those of a RUN, and there is none")
        store = sources.run.store()
        counts = store.record["languages"]
        sizes = {tag: counts[tag]["tokens"] for tag in store.tags(known.languages)}
    if k is None:
        drawn = resampled(measure, known.languages, sources, RESAMPLINGS)
        found = choice.choices(known, rule=rule, sizes=sizes, resampled=drawn)
        k, why = choice.best(found).k, {"reason": choice.reason(found)}
    clustering = grouping.cluster(known, k, rule=rule, sizes=sizes, unassigned=unassigned + unknown)
    return replace(clustering, parameters=clustering.parameters | why)


def documents_of_run(
    run: Run,
    k: int,
    languages: Sequence[str] | None = None,
    *,
    random_seed: int = 0,
    engine: Engine = map,
) -> Clustering:
    """Clusters the documents of a RUN's corpus by TF-IDF over the seed's subwords, for branching.
    languages: None takes all. engine: one of `clustering.engines.ENGINES`, which reads them."""
    made_from = {"corpus": run.store().record["corpus_sha256"]}
    documents, vectoriser = run.documents(languages, engine), run.vectoriser()
    return tfidf.cluster(documents, vectoriser, k, random_seed, made_from=made_from)


def documents_of_corpus(
    corpus: AnyCorpus,
    k: int,
    languages: Sequence[str] | None = None,
    *,
    random_seed: int = 0,
    engine: Engine = map,
) -> Clustering:
    """Clusters the documents of a corpus by TF-IDF over their characters. What is read, and what
    cannot be, is printed on stderr. Arguments as in `documents_of_run`. UserError for a language
    without documents."""
    corpus = Corpus.of(corpus)
    tags = canonical_all(languages) if languages else None
    contents, unusable = contents_of(corpus.pinned(), tags), UnusableRecords()
    contents.check()
    surveys = list(engine(Survey.of, contents.parts))
    for part, survey in zip(contents.parts, surveys):
        unusable.include(survey.unusable)
        contents.digests[part.location] = survey.digest
    missing = [tag for tag in tags or () if not any(tag in s.documents for s in surveys)]
    if missing:
        raise no_documents(missing, unusable)
    print(Reading(contents, unusable, surveys).table(), file=sys.stderr)
    if unusable:
        print(f"{corpus}: {unusable}", file=sys.stderr)
    sizes = [sum(survey.documents.values()) for survey in surveys]
    made_from = {"corpus": contents.fingerprint()}
    documents = Documents(contents.parts, engine=engine, sizes=sizes)
    return ngrams.cluster(documents, k, random_seed, made_from=made_from)


def save_with_figures(clustering: Clustering, directory: Path, *, overwrite: bool = False) -> None:
    """Writes a clustering and every figure that it has, as PNG and SVG."""
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    plots = {"sizes": clustering.plot_sizes}
    if clustering.of_documents:
        plots["composition"] = clustering.plot_composition
    elif uriel.known(clustering.languages, "geo"):
        plots["map"] = clustering.plot_map
    if clustering.merges is not None:
        plots["tree"] = clustering.plot_tree
    if clustering.distances is not None:
        plots |= {"distances": clustering.plot_distances, "plane": clustering.plot_plane}
    for name, plot in plots.items():
        figure = plot().figure.get_figure(root=True)
        for ending in ("png", "svg"):
            figure.savefig(directory / f"{name}.{ending}", dpi=150, bbox_inches="tight")
        pyplot.close(figure)
    # The record comes last, so that a command that was killed can be run again.
    clustering.save(directory, overwrite=overwrite)
