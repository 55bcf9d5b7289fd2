"""The command that lists the nearest relatives of a language."""

import argparse
import sys

from xelm.commands.options import Command, add_languages, names, show
from xelm.commands.sources import MEASURES, add_sources, check_sources, measures_named, sources_of

# The measure that relatives are ranked by, and others that every language has data for.
BY = "mixture,genealogy,typology,geography"


def _nearest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("language", metavar="LANGUAGE", help="language whose relatives are listed")
    add_languages(
        parser, "languages to compare with (default: those of --table, --tagged, --corpus or --run)"
    )
    parser.add_argument(
        "--by",
        type=names,
        default=names(BY),
        metavar="A,B",
        help=f"measures to show, among {', '.join(MEASURES)}; the first decides the order "
        f"(default: {BY})",
    )
    add_sources(parser)


def _nearest(options: argparse.Namespace) -> None:
    from xelm import tables
    from xelm.runs.nearest import little_known, relatives

    check_sources(options, [name for spec in options.by for name in measures_named(spec)])
    found = relatives(options.language, options.by, sources_of(options), options.languages)
    if warning := little_known(options.language, found, options.by[0]):
        print(warning, file=sys.stderr)
    facts = [relative.to_json() for relative in found]
    show(options, facts, tables.relatives(found, options.by))


NEAREST = Command(
    "list the nearest relatives of a language", _nearest, _nearest_options, on_run=False
)
