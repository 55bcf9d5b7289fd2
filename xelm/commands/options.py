"""What several verbs share."""

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from clustering.errors import UserError
from xelm.process import cores

if TYPE_CHECKING:
    from xelm.data.corpus import Corpus

# Whoever reads and writes for them keeps up with no more.
_MOST_WORKERS = 32


class Command(NamedTuple):
    """What the help says of a verb, what adds its options to a parser, and what runs it."""

    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def add_corpus(parser: argparse.ArgumentParser, summary: str, *, required: bool = False) -> None:
    """The options `--corpus`, `--text-field`, `--language-field` and `--language-map`."""
    parser.add_argument("--corpus", metavar="CORPUS", required=required, help=summary)
    parser.add_argument(
        "--text-field",
        metavar="NAME",
        help="field of the records that holds the text (default: text, or else content)",
    )
    parser.add_argument(
        "--language-field",
        metavar="NAME",
        help="field that holds the language (default: lang, or language where no name says it)",
    )
    parser.add_argument(
        "--language-map",
        metavar="FILE",
        help="YAML of languages by names of files, folders or values of that field, as in als: gsw",
    )


def corpus_of(options: argparse.Namespace) -> "Corpus | None":
    """The corpus of the options that `add_corpus` added; None if there is none. UserError for
    another option without it."""
    given = {
        "text_field": options.text_field,
        "language_field": options.language_field,
        "languages": options.language_map,
    }
    if not options.corpus:
        for name in ("text_field", "language_field", "language_map"):
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')} goes with --corpus")
        return None
    from xelm.data.corpus import Corpus, read_languages

    if options.language_map:
        given["languages"] = read_languages(options.language_map)
    return Corpus.of(options.corpus).with_defaults(**given)


def required_corpus(options: argparse.Namespace) -> "Corpus":
    """The same; UserError where there is none."""
    corpus = corpus_of(options)
    if corpus is None:
        raise UserError("--corpus names no corpus")
    return corpus


def add_run(parser: argparse.ArgumentParser) -> None:
    """The RUN that a verb is about."""
    parser.add_argument("run", metavar="RUN", help="directory that xelm init or quickstart made")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_settings(parser: argparse.ArgumentParser, summary: str) -> None:
    """The option `--set`."""
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=summary,
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """The option `--dry-run`, of what trains."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tell tokens, passes over each language, time and disk, and change nothing",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The option `--workers`, of what tokenises."""
    parser.add_argument(
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
