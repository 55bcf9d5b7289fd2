"""What several verbs share."""

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from xelm.process import cores

# Whoever reads and writes for them keeps up with no more.
_MOST_WORKERS = 32


class Verb(NamedTuple):
    """What the help says of a verb, what adds its options to a parser, and what runs it."""

    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def add_json(verb: argparse.ArgumentParser) -> None:
    """The option `--json`."""
    verb.add_argument("--json", action="store_true", help="print JSON")


def add_settings(verb: argparse.ArgumentParser, summary: str) -> None:
    """The option `--set`."""
    verb.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=summary,
    )


def add_workers(verb: argparse.ArgumentParser) -> None:
    """The option `--workers`, of what tokenises."""
    verb.add_argument(
        "--workers",
        type=_count,
        default=min(cores(), _MOST_WORKERS),
        metavar="N",
        help="processes that tokenise a large corpus (default: one for each core)",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number from 1; got {text!r}")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    """What stands between commas; the type of an option."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def print_json(value: Any) -> None:
    """What `--json` asks for, to stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=2))
