"""The command that measures the models and the ensemble on held-out text."""

import argparse
import dataclasses

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
from xelm.evaluation.options import EvaluationOptions


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_corpus(parser, "held-out text to measure on, as for xelm init", required=True)
    parser.add_argument(
        "--languages",
        type=names,
        metavar="A,B,...",
        help="languages of the corpus to measure on (default: all)",
    )
    fields = [field.name for field in dataclasses.fields(EvaluationOptions)]
    flags = {"routings": "--routing", "temperature": "--router-temperature"}
    add_fields(parser, EvaluationOptions, *fields, title="evaluation", flags=flags)
    add_json(parser)


def _evaluate(options: argparse.Namespace) -> None:
    from xelm import tables
    from xelm.runs.evaluate import evaluate
    from xelm.runs.results import RESULTS
    from xelm.runs.run import open_run

    run = open_run(options.run)
    chosen = EvaluationOptions(**given_fields(options, EvaluationOptions))
    results = evaluate(run, required_corpus(options), chosen, languages=options.languages)
    if options.json:
        print_json(results.record)
    else:
        print(tables.results(results, chosen.routings, run.languages))
        print(f"\nSaved in {run.results / RESULTS}")


EVALUATE = Command("measure perplexity and bits per byte by language", _evaluate_options, _evaluate)
