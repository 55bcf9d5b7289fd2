"""The command that writes features of languages from the seed model."""

import argparse
from pathlib import Path

from clustering.errors import UserError
from xelm.commands.options import (
    Command,
    add_corpus,
    add_json,
    add_run,
    corpus_of,
    names,
    print_json,
)


def _features_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_corpus(
        parser, "text to read (default: the RUN's corpus); for alignment it must be parallel"
    )
    parser.add_argument(
        "--languages", type=names, metavar="A,B,C", help="languages to read (default: all)"
    )
    parser.add_argument(
        "--of",
        choices=("states", "updates"),
        default="states",
        help="features to write: hidden states of the seed on the text (default), or updates of "
        "its weights by a few steps of training on each language",
    )
    parser.add_argument(
        "--documents",
        type=int,
        metavar="N",
        help="number of documents of each language that are read for states (default: 100)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="number of training steps on each language for updates (default: 10)",
    )
    parser.add_argument("--out", metavar="FILE", required=True, help="file to write (.npz)")
    add_json(parser)


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
        shape = f"{len(found.languages)} languages, {len(found.values)} layers"
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


FEATURES = Command(
    "write features of languages from the seed, for clustering", _features_options, _features
)
