"""The commands that inspect and maintain a RUN."""

import argparse
import dataclasses
import sys
import time
from contextlib import suppress
from pathlib import Path

from clustering.errors import UserError
from xelm.commands.options import Command, run_of, show, whole_number


def _report(options: argparse.Namespace) -> None:
    page = run_of(options).report()
    show(options, {"report": str(page)}, page)


REPORT = Command("write one self-contained HTML page about a RUN", _report)


def _status_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--watch", action="store_true", help="print it again every two seconds, until Ctrl-C"
    )
    parser.add_argument(
        "--unfinished",
        action="store_true",
        help="print only the names of experts of clusters that are not trained yet, one a line",
    )


def _status(options: argparse.Namespace) -> None:
    from xelm import tables

    run = run_of(options)
    if options.watch + options.unfinished + options.json > 1:
        raise UserError("give one of --watch, --unfinished and --json")
    if options.unfinished:
        for name in run.untrained():
            print(name)
        return
    if not options.watch:
        found = run.status()
        show(options, [dataclasses.asdict(each) for each in found], tables.status(found))
        return
    clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else ""
    with suppress(KeyboardInterrupt):
        while True:
            print(clear + tables.status(run.status()), flush=True)
            time.sleep(2)


STATUS = Command("show the progress of each training", _status, _status_options)


def _verify(options: argparse.Namespace) -> None:
    faults = run_of(options).verify()
    unchanged = f"{options.run}: every file that inference reads is unchanged"
    if options.json or not faults:
        show(options, [str(fault) for fault in faults], unchanged)
    if faults:
        first = "; ".join(map(str, faults[:5]))
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise UserError(f"{options.run} is damaged: {first}{more}")


VERIFY = Command("check every file that inference reads", _verify)


def _publish_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", help="expert that is trained, and that the gate kept back"
    )


def _publish(options: argparse.Namespace) -> None:
    published = run_of(options).publish(options.name)
    show(options, {"published": published.reference}, f"published: {published.reference}")


PUBLISH = Command(
    "publish a trained expert although it is worse than the gate allows", _publish, _publish_options
)


def _rollback_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", help="expert whose earlier version is published again"
    )
    parser.add_argument(
        "--version",
        type=whole_number,
        metavar="N",
        help="version to publish (default: the one before the version in use; directly after a "
        "rollback, none)",
    )


def _rollback(options: argparse.Namespace) -> None:
    run = run_of(options)
    before = run.registry().expert(options.name).reference
    published = run.rollback(options.name, options.version).reference
    text = f"published: {published}"
    if published == before and options.version is None:
        text += ", as after the last rollback; to go further back, give --version N"
    show(options, {"published": published}, text)


ROLLBACK = Command("publish an earlier version of an expert again", _rollback, _rollback_options)


def _discard_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        metavar="NAME",
        help="expert whose training is unfinished, dense, students/NAME, mixes/NAME, or a language "
        "whose expert was not begun",
    )


def _discard(options: argparse.Namespace) -> None:
    removed = run_of(options).discard(options.name)
    if removed is None:
        name = None
        text = f"the checkpoints of {options.name}; its training will start again"
    elif isinstance(removed, Path):
        name = str(removed)
        text = f"{removed}, the text of an expert whose training had not begun"
    else:
        name = removed.reference
        text = f"{name}, its checkpoints and its record"
    show(options, {"name": options.name, "removed": name}, f"discarded: {text}")


DISCARD = Command("discard an unfinished training", _discard, _discard_options)
