"""The commands that share experts and RUNs on the Hugging Face Hub."""

import argparse
import dataclasses
from typing import Any

from clustering.errors import UserError
from xelm.commands.options import (
    Command,
    add_corpus,
    add_fields,
    corpus_of,
    given_fields,
    run_of,
    show,
)
from xelm.runs.options import PushOptions


def _push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="expert to push, or NAME@vN for a certain version of it (default: the whole RUN)",
    )
    parser.add_argument("--to", metavar="OWNER/REPO", required=True, help="repository to write")
    parser.add_argument("--dry-run", action="store_true", help="list the files, and reach no host")
    add_fields(parser, PushOptions, title="repository")


def _push(options: argparse.Namespace) -> None:
    from xelm import tables

    run, how = run_of(options), PushOptions(**given_fields(options, PushOptions))
    work = run.plan_push if options.dry_run else run.push
    done = work(options.to, options.name, how)
    show(options, dataclasses.asdict(done), tables.pushed(done))


PUSH = Command(
    "write an expert, or the whole RUN without its text, to the Hugging Face Hub",
    _push,
    _push_options,
)


def _pull_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="OWNER/REPO", help="repository that xelm push wrote")
    parser.add_argument("out", metavar="DIR", nargs="?", help="new directory for a whole RUN")
    parser.add_argument("--into", metavar="RUN", help="RUN that a single expert joins")
    add_corpus(parser, "text in the languages of the expert, with --into (default: the RUN's)")
    parser.add_argument(
        "--revision", metavar="R", help="branch, tag or commit to read (default: main)"
    )


def _pull(options: argparse.Namespace) -> None:
    from xelm.api import open_run, pull

    if (options.out is None) == (options.into is None):
        raise UserError("give a new directory for a whole RUN, or --into RUN for a single expert")
    if options.into is not None:
        expert = open_run(options.into).pull(options.name, corpus_of(options), options.revision)
        show(options, {"published": expert.reference}, f"{expert.status}: {expert.reference}")
        return
    if corpus_of(options) is not None:
        raise UserError("--corpus goes with --into")
    done = pull(options.name, options.out, options.revision)
    facts: dict[str, Any] = dataclasses.asdict(done) | {"directory": str(done.directory)}
    text = (
        f"{done.directory}: {len(done.experts)} experts in {done.files} files, "
        f"{done.bytes / 1e6:,.1f} MB, each as its hash says; commit {done.commit}"
    )
    show(options, facts, text)


PULL = Command(
    "read a whole RUN from the Hugging Face Hub, or an expert that joins a RUN",
    _pull,
    _pull_options,
    on_run=False,
)
