"""The command that writes features of languages from the seed model."""

import argparse
from pathlib import Path

from clustering.errors import UserError
from xelm.commands.options import (
    Command,
    add_corpus,
    add_languages,
    corpus_of,
    run_of,
    show,
    whole_number,
)


def _features_options(parser: argparse.ArgumentParser) -> None:
    add_corpus(
        parser, "text to read (default: the RUN's corpus); for alignment it must be parallel"
    )
    add_languages(parser, "languages to read (default: all)")
    parser.add_argument(
        "--of",
        choices=("states", "updates"),
        default="states",
        help="features to write: hidden states of the seed on the text (default), or updates of "
        "its weights by a few steps of training on each language",
    )
    parser.add_argument(
        "--documents",
        type=whole_number,
        metavar="N",
        help="number of documents of each language that are read for states (default: 100)",
    )
    parser.add_argument(
        "--steps",
        type=whole_number,
        metavar="N",
        help="number of training steps on each language for updates (default: 10)",
    )
    parser.add_argument("--out", metavar="FILE", required=True, help="file to write (.npz)")


def _features(options: argparse.Namespace) -> None:
    if Path(options.out).exists():
        raise UserError(f"{options.out} exists already; choose another file")
    run = run_of(options)
    if options.of == "updates":
        if options.corpus or options.documents is not None:
            raise UserError("--corpus and --documents go with --of states")
        found = run.updates(options.languages, **_given(steps=options.steps))
        shape = f"{len(found.languages)} languages, {len(found.values)} layers"
    else:
        if options.steps is not None:
            raise UserError("--steps goes with --of updates")
        count = _given(documents=options.documents)
        found = run.features(corpus_of(options), options.languages, **count)
        languages, documents, layers, width = found.values.shape
        shape = f"{languages} languages, {documents} documents of each, {layers} layers of {width}"
    found.save(options.out)
    facts = {"out": options.out, "shape": shape, "languages": list(found.languages)}
    show(options, facts, f"{shape}: {options.out}")


def _given(**options: int | None) -> dict[str, int]:
    return {name: value for name, value in options.items() if value is not None}


FEATURES = Command(
    "write features of languages from the seed, for clustering", _features, _features_options
)
