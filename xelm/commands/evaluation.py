"""The command that measures the models and the ensemble on held-out text."""

import argparse

from xelm.commands.options import (
    Command,
    add_corpus,
    add_fields,
    add_json,
    add_run,
    given_fields,
    names,
    print_json,
    required_corpus,
)
from xelm.commands.routing import FLAGS
from xelm.evaluation.options import CALIBRATION_TOKENS, EVALUATED
from xelm.inference.routing import ROUTINGS, Routing


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_corpus(parser, "held-out text to measure on, as for xelm init", required=True)
    parser.add_argument(
        "--routing",
        type=names,
        default=EVALUATED,
        metavar="A,B",
        help=f"routings to measure, among {', '.join(ROUTINGS[:-1])} (default: "
        f"{', '.join(EVALUATED)}); language alone is the quickest",
    )
    parser.add_argument(
        "--languages",
        type=names,
        metavar="A,B,C",
        help="languages of the corpus to measure on (default: all)",
    )
    parser.add_argument(
        "--max-documents",
        type=int,
        metavar="N",
        help="largest number of documents of each language to score (default: all)",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        default=CALIBRATION_TOKENS,
        metavar="N",
        help="number of tokens of each language on which calibration is measured (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="number of tokens that a model reads at once (default: the models' context length)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="number of tokens from one window of a longer document to the next (default: the "
        "context length); a small one gives every token more context and takes longer",
    )
    add_fields(
        parser, Routing, "top_m", "least_weight", "temperature", title="routing", flags=FLAGS
    )
    add_json(parser)


def _evaluate(options: argparse.Namespace) -> None:
    from xelm import tables
    from xelm.runs.evaluate import evaluate
    from xelm.runs.results import RESULTS
    from xelm.runs.run import open_run

    run = open_run(options.run)
    results = evaluate(
        run,
        required_corpus(options),
        routings=options.routing,
        **given_fields(options, Routing),
        languages=options.languages,
        max_documents=options.max_documents,
        calibration_tokens=options.calibration_tokens,
        context_length=options.context_length,
        stride=options.stride,
    )
    if options.json:
        print_json(results.record)
    else:
        print(tables.results(results, options.routing, run.languages))
        print(f"\nSaved in {run.results / RESULTS}")


EVALUATE = Command("measure perplexity and bits per byte by language", _evaluate_options, _evaluate)
