"""Options that name what distances between languages are computed from; cluster and nearest have
them."""

import argparse
from collections.abc import Collection
from typing import TYPE_CHECKING

from clustering.errors import UserError
from xelm.commands.options import add_corpus, corpus_of, names

if TYPE_CHECKING:
    from xelm.runs.distances import Sources

MEASURES = (
    *("mixture", "typology", "genealogy", "geography", "table"),
    *("words", "characters", "subwords", "names"),
    *("states", "alignment", "updates", "losses"),
)
# Measures and methods that read --corpus.
_OF_TEXT = ("words", "characters", "subwords", "mixture", "tfidf")


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name the data of measures."""
    parser.add_argument(
        "--run", metavar="RUN", help="RUN that supplies the corpus, subwords or losses"
    )
    add_corpus(parser, "text, for words, characters, subwords and mixture")
    parser.add_argument(
        "--features",
        metavar="SETS",
        help="feature sets of URIEL for typology, such as syntax_knn+phonology_knn (default: "
        "syntax_average; syntax_knn for mixture)",
    )
    parser.add_argument(
        "--only",
        type=names,
        metavar="A,B",
        default=(),
        help="names of features to use, for typology and table (default: all)",
    )
    parser.add_argument("--table", metavar="FILE", help="CSV of features by language, for table")
    parser.add_argument(
        "--tagged", metavar="DIR", help="folder of <language>.conllu[.gz|.zst], for names"
    )
    parser.add_argument(
        "--states", metavar="FILE", help="file that xelm features wrote, for states and alignment"
    )
    parser.add_argument(
        "--updates", metavar="FILE", help="file that xelm features --of updates wrote, for updates"
    )
    parser.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="layer of the model (default: the middle one for states and alignment, the last "
        "three for updates)",
    )


def sources_of(options: argparse.Namespace) -> "Sources":
    """Returns the data that the options of `add_sources` name."""
    from xelm.runs.distances import Sources
    from xelm.runs.run import open_run

    return Sources(
        features=options.features,
        only=options.only,
        table=options.table,
        corpus=corpus_of(options),
        run=open_run(options.run) if options.run else None,
        tagged=options.tagged,
        states=options.states,
        updates=options.updates,
        layer=options.layer,
    )


def check_sources(options: argparse.Namespace, methods: Collection[str]) -> None:
    """Raises UserError for an option of `add_sources` that none of these methods reads."""
    wants = {
        "--features": (options.features, ("typology", "mixture")),
        "--only": (options.only, ("typology", "mixture", "table")),
        "--table": (options.table, ("table",)),
        "--tagged": (options.tagged, ("names",)),
        "--states": (options.states, ("states", "alignment")),
        "--updates": (options.updates, ("updates",)),
        "--layer": (options.layer is not None, ("states", "alignment", "updates")),
    }
    if options.languages:  # without them, --corpus states which languages there are
        wants["--corpus"] = (options.corpus, _OF_TEXT)
    for name, (given, allowed) in wants.items():
        if given and not set(methods) & set(allowed):
            raise UserError(f"{name} goes with {' or '.join(allowed)}")


def measures_named(spec: str) -> list[str]:
    """Splits a mixture such as "typology:.7+genealogy:.3" into names of measures."""
    return [part.partition(":")[0].strip() for part in spec.split("+")]
