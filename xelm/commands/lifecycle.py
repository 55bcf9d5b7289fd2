"""The commands for the life of experts: in and out of use, and what happened to them."""

import argparse
import dataclasses

from xelm.commands.options import Command, run_of, show


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
        type=int,
        metavar="N",
        help="version to publish (default: the one that was in use when it was retired)",
    )


def _restore(options: argparse.Namespace) -> None:
    reference = run_of(options).restore(options.name, options.version).reference
    show(options, {"published": reference}, f"published: {reference}")


RESTORE = Command("publish a retired expert again", _restore, _restore_options)
