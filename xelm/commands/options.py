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
    """Adds the options `--corpus`, `--text-field`, `--language-field` and `--language-map`."""
    parser.add_argument("--corpus", metavar="CORPUS", required=required, help=summary)
    parser.add_argument(
        "--text-field",
        metavar="NAME",
        help="field of a record that contains the text (default: text, or else content)",
    )
    parser.add_argument(
        "--language-field",
        metavar="NAME",
        help="field of a record that contains its language (default: lang; or language, where no "
        "file name states it)",
    )
    parser.add_argument(
        "--language-map",
        metavar="FILE",
        help="YAML file that maps names of files or folders, or values of that field, to "
        "languages, such as als: gsw",
    )


def corpus_of(options: argparse.Namespace) -> "Corpus | None":
    """Returns the corpus that the options of `add_corpus` name, or None. Raises UserError for
    another of these options without --corpus."""
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
    """Returns the corpus as `corpus_of` does; raises UserError where there is none."""
    corpus = corpus_of(options)
    if corpus is None:
        raise UserError("--corpus is empty; name a folder or file of text")
    return corpus


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds the argument RUN."""
    parser.add_argument(
        "run", metavar="RUN", help="directory that xelm init or xelm quickstart made"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON to stdout")


def add_settings(parser: argparse.ArgumentParser, summary: str) -> None:
    """Adds the option `--set`."""
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=summary,
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--dry-run` to a command that trains."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the tokens, the passes over each language, the time and the disk space that "
        "this needs, and change nothing",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--workers` to a command that tokenises."""
    parser.add_argument(
        "--workers",
        type=_count,
        default=min(cores(), _MOST_WORKERS),
        metavar="N",
        help="number of processes that tokenise a large corpus (default: one for each core)",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 wanted; got {text!r}")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    """Splits an argument at its commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def print_json(value: Any) -> None:
    """Prints a value as JSON on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=2))
