"""The commands that inspect and maintain a RUN."""

import argparse
from contextlib import suppress
from pathlib import Path

from clustering.errors import UserError
from xelm.commands.options import Command, add_json, add_run, print_json


def _report_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_json(parser)


def _report(options: argparse.Namespace) -> None:
    from xelm.runs.report import report
    from xelm.runs.run import open_run

    page = report(open_run(options.run))
    if options.json:
        print_json({"report": str(page)})
    else:
        print(page)


REPORT = Command("write one self-contained HTML page about a RUN", _report_options, _report)


def _status_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--watch", action="store_true", help="print it again every two seconds, until Ctrl-C"
    )
    parser.add_argument(
        "--unfinished",
        action="store_true",
        help="print only the names of experts of clusters that are not trained yet, one a line",
    )
    add_json(parser)


def _status(options: argparse.Namespace) -> None:
    import dataclasses
    import sys
    import time

    from xelm import tables
    from xelm.runs.run import open_run
    from xelm.runs.status import progress

    run = open_run(options.run)
    if options.watch + options.unfinished + options.json > 1:
        raise UserError("give one of --watch, --unfinished and --json")
    if options.unfinished:
        for expert in run.registry().training():
            if expert.cluster is not None:
                print(expert.name)
        return
    if options.json:
        print_json([dataclasses.asdict(each) for each in progress(run)])
        return
    if not options.watch:
        print(tables.status(progress(run)))
        return
    clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else ""
    with suppress(KeyboardInterrupt):
        while True:
            print(clear + tables.status(progress(run)), flush=True)
            time.sleep(2)


STATUS = Command("show the progress of each training", _status_options, _status)


def _verify_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_json(parser)


def _verify(options: argparse.Namespace) -> None:
    from experts.verify import verify
    from xelm.runs.run import open_run

    faults = verify(open_run(options.run).directory)
    if options.json:
        print_json([str(fault) for fault in faults])
    if faults:
        first = "; ".join(map(str, faults[:5]))
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise UserError(f"{options.run} is damaged: {first}{more}")
    if not options.json:
        print(f"{options.run}: every file that inference reads is unchanged")


VERIFY = Command("check every file that inference reads", _verify_options, _verify)


def _rollback_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "name", metavar="NAME", help="expert whose earlier version is published again"
    )
    parser.add_argument(
        "--version",
        type=int,
        metavar="N",
        help="version to publish (default: the one before the version in use)",
    )
    add_json(parser)


def _rollback(options: argparse.Namespace) -> None:
    from experts.lock import update
    from xelm.runs.run import open_run

    run = open_run(options.run)
    registry = update(run.directory, lambda r: r.rollback(options.name, options.version))
    published = registry.expert(options.name).reference
    if options.json:
        print_json({"published": published})
    else:
        print(f"published: {published}")


ROLLBACK = Command("publish an earlier version of an expert again", _rollback_options, _rollback)


def _discard_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "name",
        metavar="NAME",
        help="expert whose training is unfinished, dense, or a language whose expert was not begun",
    )
    add_json(parser)


def _discard(options: argparse.Namespace) -> None:
    from xelm.runs.discard import discard
    from xelm.runs.run import open_run

    removed = discard(open_run(options.run), options.name)
    if options.json:
        shown = str(removed) if isinstance(removed, Path) else removed and removed.reference
        print_json({"name": options.name, "removed": shown})
    elif isinstance(removed, Path):
        print(f"discarded: {removed}, the text of an expert whose training had not begun")
    elif removed is not None:
        print(f"discarded: {removed.reference}, its checkpoints and its record")
    else:
        print(f"discarded: the checkpoints of {options.name}; its training will start again")


DISCARD = Command("discard an unfinished training", _discard_options, _discard)


def _merge_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="experts to average (default: all published ones)",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="directory for the averaged checkpoint"
    )
    add_json(parser)


def _merge(options: argparse.Namespace) -> None:
    from xelm.runs.merge import merge
    from xelm.runs.run import open_run

    run = open_run(options.run)
    out = merge(run, options.out, options.names)
    if options.json:
        registry = run.registry()
        experts = [registry.expert(name) for name in options.names] or registry.published()
        print_json({"out": str(out), "experts": [expert.reference for expert in experts]})
    else:
        print(out)


MERGE = Command("average the weights of experts into one checkpoint", _merge_options, _merge)
