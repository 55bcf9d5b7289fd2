"""The command line: parses arguments, runs a command, and reports a user's mistake in one line."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from clustering.errors import UserError
from xelm.commands import COMMANDS
from xelm.process import prepare
from xelm.training.preemption import Preempted
from xelm.version import __version__

_EXTRAS = {
    "tensorboardX": ("tensorboard", "runtime.tensorboard=true"),
    "wandb": ("wandb", "runtime.wandb=true"),
    **dict.fromkeys(
        ("starlette", "uvicorn", "pydantic", "prometheus_client"), ("serve", "xelm serve")
    ),
}
"""Module -> the extra of xelm that installs it, and the feature that needs it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0; 2 for a user's mistake; 130 if interrupted; 75
    (EX_TEMPFAIL: try again) if SIGTERM ended a training. A training is saved first."""
    place = None
    try:
        options = _parsed(sys.argv[1:] if arguments is None else arguments)
        place = getattr(options, "run", None)
        prepare()
        options.run_command(options)
    except KeyboardInterrupt:
        print("xelm: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except Preempted as stop:
        print(f"xelm: {stop}", file=sys.stderr)
        return 130 if stop.by == signal.SIGINT else os.EX_TEMPFAIL
    except BrokenPipeError:
        # The program that reads the output has ended, which is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        line = _mistake(error, place)
        if line is None:
            raise
        print(f"xelm: {line}", file=sys.stderr)
        return 2
    return 0


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"an argument is not UTF-8: {argument!r}") from None
    top = parser()
    options, rest = top.parse_known_args(arguments)
    # argparse does not add names that come after a flag to `names`.
    if rest and ("names" not in options or any(name.startswith("-") for name in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.names = [*options.names, *rest]
    return options


class _Parser(argparse.ArgumentParser):
    """Parser that reports a mistake in one line, as the rest of the program does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands with their options."""
    top = _Parser(
        prog="xelm",
        description="Cross-lingual expert language models: cluster languages, train an "
        "expert for each cluster, grow experts for new languages, and run them as an ensemble.",
    )
    top.add_argument("--version", action="version", version=f"xelm {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        description = f"{command.summary[0].upper()}{command.summary[1:]}."
        options = commands.add_parser(name, help=command.summary, description=description)
        command.add_to(options)
    return top


def _mistake(error: Exception, place: str | None = None) -> str | None:
    """Describes an error that a user can do something about in one line; None for a bug. place: the
    directory that the command works in."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        # Errors of writing to an open file do not name it.
        where = error.filename or place
        return f"{where}: {error.strerror or error}" if where else str(error.strerror or error)
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        extra, what = _EXTRAS[error.name]
        return f"{what} needs {error.name}; pip install 'xelm[{extra}]'"
    # JAX, which is not imported here, raises its own kind of RuntimeError.
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return (
            "the memory of the device is used up; a training needs less with --set, a higher "
            "runtime.accumulation_steps or runtime.rematerialise=true"
        )
    return None


if __name__ == "__main__":
    sys.exit(main())
