"""Options that several commands share, and options made from the fields of dataclasses."""

import argparse
import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from clustering.errors import UserError
from xelm.process import cores
from xelm.settings import field_notes

if TYPE_CHECKING:
    from xelm.api import Run
    from xelm.data.corpus import Corpus

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,2})?", re.I | re.A)
_MOST_WORKERS = 32
"""Number of tokenising processes beyond which the process that writes does not keep up."""


class Command(NamedTuple):
    """A command of the command line."""

    summary: str
    """Description for the help."""
    run: Callable[[argparse.Namespace], None]
    """Function that runs the command."""
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    """Function that adds options of the command's own to its parser."""
    on_run: bool = True
    """Whether the first argument is a RUN."""
    json: bool = True
    """Whether there is the option `--json`."""

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Adds all arguments and options of the command to its parser."""
        if self.on_run:
            place = "directory that xelm init or xelm quickstart made"
            parser.add_argument("run", metavar="RUN", help=place)
        self.add_options(parser)
        if self.json:
            parser.add_argument("--json", action="store_true", help="print JSON to stdout")
        parser.set_defaults(run_command=self.run)


def add_fields(
    parser: argparse.ArgumentParser,
    kind: type,
    *fields: str,
    title: str,
    flags: Mapping[str, str] | None = None,
    choices: Mapping[str, Sequence[str]] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Adds an option for each of these fields of a dataclass, or for every field, with the type,
    default and explanation of the field. `given_fields` returns the values that a user gave.

    title: heading above the options. flags: options that are not named as their fields are.
    choices: values that the options take, where the type does not say it. elsewhere: places
    that have a default which precedes that of the dataclass.
    """
    hints, notes = typing.get_type_hints(kind), field_notes(kind)
    values: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(kind)}
    names = {name: f"--{name.replace('_', '-')}" for name in values} | dict(flags or {})
    group = parser.add_argument_group(title)
    for field in fields or values:
        parts = re.split(r"\. (?:None|Empty|False): ", notes[field].removesuffix("."))
        note, default, *_ = [*parts, ""]
        note = re.sub("`(.+?)`", lambda found: names.get(found[1], found[1]), note)
        note = note.removeprefix("Whether to ")  # an option without a value
        if note[1].islower():
            note = note[0].lower() + note[1:]
        if not default and isinstance(values[field], str | float | int):
            default = str(values[field])
        elif not default and isinstance(values[field], tuple):
            default = ", ".join(values[field])
        if elsewhere and field in elsewhere:
            default = f"{elsewhere[field]}, or else {default}"
        group.add_argument(
            names[field],
            dest=f"{kind.__name__}.{field}",
            help=(note + (f" (default: {default})" if default else "")).replace("%", "%%"),
            **_value(hints[field], (choices or {}).get(field)),
        )


def given_fields(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Field -> value, for the options of `add_fields` that the user gave."""
    prefix, found = f"{kind.__name__}.", {}
    for name, value in vars(options).items():
        if name.startswith(prefix) and value is not None:
            found[name.removeprefix(prefix)] = tuple(value) if isinstance(value, list) else value
    return found


def _value(hint: Any, choices: Sequence[str] | None) -> dict[str, Any]:
    """Arguments of `add_argument` for a field of this type."""
    if choices:
        return {"choices": choices}
    if isinstance(hint, types.UnionType):
        *_, hint = (part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    return {
        int: {"type": whole_number, "metavar": "N"},
        float: {"type": number, "metavar": "X"},
        bool: {"action": "store_true", "default": None},
        str: {"metavar": "NAME"},
        Path: {"metavar": "PATH"},
        Sequence[str]: {"type": names, "metavar": "A,B,..."},
        tuple[str, ...]: {"action": "append", "metavar": "TEXT"},
        Mapping[str, float]: {"type": _weights, "metavar": "NAME=X,..."},
    }[hint]


def whole_number(text: str) -> int:
    """Parses a whole number, such as 5 or 1e6."""
    try:
        return int(text)  # exact, however large
    except ValueError:
        value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"a whole number such as 5 or 1e6 wanted; got {text!r}")
    return int(value)


def number(text: str) -> float:
    """Parses a number, such as .5."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number such as .5 wanted; got {text!r}") from None


def _weights(text: str) -> dict[str, float]:
    """Parses numbers by name, such as "en=.7,de=.3"."""
    found = {}
    for part in names(text):
        name, equals, weight = part.partition("=")
        try:
            found[name] = float(weight)
        except ValueError:
            equals = ""
        if not equals:
            raise argparse.ArgumentTypeError(f"weights such as en=.7,de=.3 wanted; got {part!r}")
    return found


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
    """Returns the corpus that the options of `add_corpus` name, or None without them."""
    if options.corpus is None:
        for name in ("text_field", "language_field", "language_map"):
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')} goes with --corpus")
        return None
    if not options.corpus:
        raise UserError("--corpus is empty; name a folder or file of text")
    from xelm.data.corpus import Corpus, read_languages

    return Corpus.of(options.corpus).with_defaults(
        text_field=options.text_field,
        language_field=options.language_field,
        languages=options.language_map and read_languages(options.language_map),
    )


def run_of(options: argparse.Namespace) -> "Run":
    """Returns the RUN that the options name, with the settings of `--set` if there are any."""
    from xelm.api import open_run

    return open_run(options.run, settings=getattr(options, "settings", ()))


def add_languages(parser: argparse.ArgumentParser, summary: str) -> None:
    """Adds the option `--languages`."""
    parser.add_argument("--languages", type=names, metavar="A,B,...", help=summary)


def add_settings(parser: argparse.ArgumentParser, summary: str) -> None:
    """Adds the option `--set`."""
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help=summary
    )


def add_budget(parser: argparse.ArgumentParser) -> None:
    """Adds --tokens and --passes, how much one training reads."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--tokens", metavar="N", help="tokens to train on, such as 3e6 (default: the RUN's setting)"
    )
    group.add_argument(
        "--passes", metavar="X", help="passes over the expert's own text, in place of --tokens"
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
        metavar="N",
        help="number of processes that tokenise a large corpus (default: one for each core)",
    )


def workers_of(options: argparse.Namespace) -> int:
    """Returns the number of processes that tokenise, by the option of `add_workers`."""
    return options.workers or min(cores(), _MOST_WORKERS)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 wanted; got {text!r}")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    """Splits an argument at its commas."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"names separated by commas wanted; got {text!r}")
    return found


def show(options: argparse.Namespace, facts: Any, text: object) -> None:
    """Prints a result to stdout: with `--json` the facts as JSON, otherwise the text."""
    print(json.dumps(facts, ensure_ascii=False, indent=2) if options.json else text)
