"""Options of cluster and nearest: what distances between languages are computed from."""

import argparse
from collections.abc import Collection
from typing import TYPE_CHECKING

from clustering.errors import UserError
from xelm.commands.options import add_corpus, add_fields, corpus_of, given_fields, run_of
from xelm.runs.measures import MEASURES, Data

if TYPE_CHECKING:
    from xelm.runs.distances import Sources


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name the data of measures."""
    parser.add_argument(
        "--run", metavar="RUN", help="RUN that supplies the corpus, subwords or losses"
    )
    add_corpus(parser, "text, for words, characters, subwords and mixture")
    add_fields(parser, Data, title="data of measures")


def sources_of(options: argparse.Namespace) -> "Sources":
    """Returns the data that the options of `add_sources` name."""
    from xelm.runs.distances import Sources

    run = run_of(options) if options.run else None
    return Sources(corpus=corpus_of(options), run=run, **given_fields(options, Data))


def check_sources(options: argparse.Namespace, methods: Collection[str]) -> None:
    """Raises UserError for an option of `add_sources` that none of these methods reads."""
    reads = {**MEASURES, "tfidf": ("corpus",)}
    given = list(given_fields(options, Data))
    if options.corpus and options.languages:  # without them, --corpus states the languages
        given.append("corpus")
    for field in given:
        allowed = [method for method, fields in reads.items() if field in fields]
        if not set(methods) & set(allowed):
            raise UserError(f"--{field} goes with {' or '.join(allowed)}")


def measures_named(spec: str) -> list[str]:
    """Splits a mixture such as "typology:.7+genealogy:.3" into names of measures."""
    return [part.partition(":")[0].strip() for part in spec.split("+")]
