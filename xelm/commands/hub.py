"""The commands that share experts and RUNs on the Hugging Face Hub."""

import argparse
import dataclasses
from typing import Any

from xelm.commands.options import Command, add_fields, given_fields, run_of, show
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
    parser.add_argument("out", metavar="DIR", help="new directory for the RUN")
    parser.add_argument(
        "--revision", metavar="R", help="branch, tag or commit to read (default: main)"
    )


def _pull(options: argparse.Namespace) -> None:
    from xelm.api import pull

    done = pull(options.name, options.out, options.revision)
    facts: dict[str, Any] = dataclasses.asdict(done) | {"directory": str(done.directory)}
    text = (
        f"{done.directory}: {len(done.experts)} experts in {done.files} files, "
        f"{done.bytes / 1e6:,.1f} MB, each as its hash says; commit {done.commit}"
    )
    show(options, facts, text)


PULL = Command(
    "read a whole RUN from the Hugging Face Hub into a new directory",
    _pull,
    _pull_options,
    on_run=False,
)
