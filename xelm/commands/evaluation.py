"""The command that measures the models and the ensemble on held-out text."""

import argparse

from xelm.commands.options import (
    Command,
    add_corpus,
    add_fields,
    add_languages,
    corpus_of,
    given_fields,
    run_of,
    show,
)
from xelm.evaluation.options import EvaluationOptions


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    add_corpus(parser, "held-out text to measure on, as for xelm init", required=True)
    add_languages(parser, "languages of the corpus to measure on (default: all)")
    flags = {"routings": "--routing", "temperature": "--router-temperature"}
    add_fields(parser, EvaluationOptions, title="evaluation", flags=flags)


def _evaluate(options: argparse.Namespace) -> None:
    from xelm import tables
    from xelm.runs.results import RESULTS

    run, corpus = run_of(options), corpus_of(options)
    assert corpus is not None  # the option is required
    chosen = EvaluationOptions(**given_fields(options, EvaluationOptions))
    results = run.evaluate(corpus, chosen, languages=options.languages)
    table = tables.results(results, chosen.routings, run.languages)
    show(options, results.record, f"{table}\n\nSaved in {run.results / RESULTS}")


EVALUATE = Command("measure perplexity and bits per byte by language", _evaluate, _evaluate_options)
