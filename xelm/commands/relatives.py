"""Nearest relatives of a language, and what a seed makes of languages."""

import argparse
import sys
from pathlib import Path

from clustering.errors import UserError
from xelm.commands.options import Verb, add_corpus, add_json, add_run, corpus_of, names, print_json
from xelm.commands.sources import MEASURES, add_sources, check_sources, measures_named, sources_of

# What relatives are ranked by, and what else is shown of languages that only have a code.
BY = "mixture,genealogy,typology,geography"


def _nearest_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("language", metavar="LANGUAGE", help="language whose relatives are listed")
    verb.add_argument(
        "--languages",
        type=names,
        metavar="A,B,C",
        help="languages to compare with (default: those of --table, --tagged, --corpus or --run)",
    )
    verb.add_argument(
        "--by",
        type=names,
        default=names(BY),
        metavar="A,B",
        help=f"measures, of {', '.join(MEASURES)}; nearest by the first comes first "
        f"(default: {BY})",
    )
    add_sources(verb)
    add_json(verb)


def _nearest(options: argparse.Namespace) -> None:
    from xelm import tables
    from xelm.runs.relatives import little_known, relatives

    check_sources(options, [name for spec in options.by for name in measures_named(spec)])
    found = relatives(options.language, options.by, sources_of(options), options.languages)
    if warning := little_known(options.language, found, options.by[0]):
        print(warning, file=sys.stderr)
    if options.json:
        print_json([relative.to_json() for relative in found])
    else:
        print(tables.relatives(found, options.by))


NEAREST = Verb("list the nearest relatives of a language", _nearest_options, _nearest)


def _features_options(verb: argparse.ArgumentParser) -> None:
    add_run(verb)
    add_corpus(verb, "text to read (default: the RUN's); parallel for alignment")
    verb.add_argument(
        "--languages", type=names, metavar="A,B,C", help="languages to read (default: all)"
    )
    verb.add_argument(
        "--of",
        choices=("states", "updates"),
        default="states",
        help="what is written: states of the seed as it reads (default), or how a few steps of "
        "training on each language move it",
    )
    verb.add_argument(
        "--documents",
        type=int,
        metavar="N",
        help="documents of each language, to read for states (default: 100)",
    )
    verb.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="steps of training on each language, for updates (default: 10)",
    )
    verb.add_argument("--out", metavar="FILE", required=True, help="file to write, .npz")
    add_json(verb)


def _features(options: argparse.Namespace) -> None:
    from xelm.runs.features import features
    from xelm.runs.run import open_run
    from xelm.runs.updates import updates

    if Path(options.out).exists():
        raise UserError(f"{options.out} exists already; choose another file")
    run = open_run(options.run)
    if options.of == "updates":
        if options.corpus or options.documents is not None:
            raise UserError("--corpus and --documents go with --of states")
        found = updates(run, options.languages, **_given(steps=options.steps))
        shape = f"{len(found.languages)} languages, {len(found.inner)} layers"
    else:
        if options.steps is not None:
            raise UserError("--steps goes with --of updates")
        found = features(
            run, corpus_of(options), options.languages, **_given(documents=options.documents)
        )
        languages, documents, layers, width = found.values.shape
        shape = f"{languages} languages, {documents} documents of each, {layers} layers of {width}"
    found.save(options.out)
    if options.json:
        print_json({"out": options.out, "shape": shape, "languages": list(found.languages)})
    else:
        print(f"{shape}: {options.out}")


def _given(**options: int | None) -> dict[str, int]:
    return {name: value for name, value in options.items() if value is not None}


FEATURES = Verb("write what the seed makes of text, for clustering", _features_options, _features)
