"""The commands for the life of experts: in and out of use, and what happened to them."""

import argparse
import dataclasses
import sys

from clustering.errors import UserError
from xelm.commands.options import Command, run_of, show, whole_number


def _history_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="expert whose history is shown (default: all)"
    )


def _history(options: argparse.Namespace) -> None:
    from xelm import tables

    events = run_of(options).history(options.name)
    show(options, [event.to_json() for event in events], tables.history(events))


HISTORY = Command("show what changed the experts, when, and how", _history, _history_options)


def _experts(options: argparse.Namespace) -> None:
    from xelm import tables

    found = run_of(options).experts()
    show(options, [dataclasses.asdict(each) for each in found], tables.experts(found))


EXPERTS = Command("list all versions of all experts", _experts)


def _diff_options(parser: argparse.ArgumentParser) -> None:
    model = "NAME (the version in use), NAME@v1, or seed"
    parser.add_argument("first", metavar="A", help=f"model to compare: {model}")
    parser.add_argument("second", metavar="B", help="model to compare it with")


def _diff(options: argparse.Namespace) -> None:
    from xelm import tables

    found = run_of(options).diff(options.first, options.second)
    show(options, dataclasses.asdict(found), tables.comparison(found))


DIFF = Command("show how two experts, or an expert and the seed, differ", _diff, _diff_options)


def _retire_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="expert to take out of use")


def _retire(options: argparse.Namespace) -> None:
    run = run_of(options)
    reference = run.retire(options.name).reference
    text = f"retired: {reference}; bring it back with: xelm restore {run.directory} {options.name}"
    show(options, {"retired": reference}, text)


RETIRE = Command(
    "take an expert out of use; its files stay, and no other expert changes",
    _retire,
    _retire_options,
)


def _restore_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="retired expert to publish again")
    parser.add_argument(
        "--version",
        type=whole_number,
        metavar="N",
        help="version to publish (default: the one that was in use when it was retired)",
    )


def _restore(options: argparse.Namespace) -> None:
    reference = run_of(options).restore(options.name, options.version).reference
    show(options, {"published": reference}, f"published: {reference}")


RESTORE = Command("publish a retired expert again", _restore, _restore_options)


def _remove_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="expert to delete in all its versions")
    parser.add_argument("--yes", action="store_true", help="delete it without asking")
    parser.add_argument(
        "--dry-run", action="store_true", help="list what would be deleted and what would remain"
    )


def _remove(options: argparse.Namespace) -> None:
    from xelm import tables

    run = run_of(options)
    found = run.plan_removal(options.name)
    if not options.dry_run:
        if not options.yes and found.versions:
            _confirm(options.name, tables.removal(found, done=False))
        found = run.remove(options.name)
    text = tables.removal(found, done=not options.dry_run)
    show(options, dataclasses.asdict(found) | {"done": not options.dry_run}, text)


def _confirm(name: str, plan: str) -> None:
    """Asks on the terminal whether to go on; UserError unless the answer is the name."""
    if not sys.stdin.isatty():
        raise UserError(f"{name} is deleted for good; give --yes, or --dry-run to see what that is")
    print(plan, file=sys.stderr)
    print(f"Type {name} to delete it for good: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip() != name:
        raise UserError(f"nothing was deleted: the answer was not {name}")


REMOVE = Command(
    "delete an expert for good, with its text and its other traces, and list what remains",
    _remove,
    _remove_options,
)
