"""Runs a command on copies of a RUN, and kills it before each of its operations on files.

As a program it imports everything once, and forks a process for each run. It prints one line of
JSON for each copy: the faults that `xelm verify` finds after the kill, whether the registry loads,
and the exit code of the same command, run again. The last copy is of a run that was not killed.
"""

import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

KILLED = 77
"""Exit code of a killed run."""
MOST = 200
"""Largest number of operations, so that this ends in any case."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


def killed_everywhere(template: Path, folder: Path, *command: str) -> list[dict]:
    """Outcomes for `folder`/0, `folder`/1, ...; copies of `template`, which is "RUN" in the
    command. The last one was not killed."""
    arguments = [sys.executable, "-B", __file__, template, folder, *command]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [str(argument) for argument in arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _kill_before(number: int) -> None:
    """Ends this process before its operation of this number that changes files."""
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if not opened and event not in CHANGES:
            return
        if isinstance(arguments[0], str) and arguments[0].startswith("/dev/"):
            return
        if count == number:
            os._exit(KILLED)
        count += 1

    sys.addaudithook(watch)


def _forked(work, number: int | None = None) -> int:
    """Exit code of `work`, run by a process of its own."""
    sys.stdout.flush()
    process = os.fork()
    if not process:
        code = 1
        try:
            if number is not None:
                _kill_before(number)
            code = work()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _main(template: Path, folder: Path, words: list[str]) -> None:
    from experts.registry import Registry
    from experts.verify import verify
    from xelm import cli
    from xelm.runs import publish

    figures = {"documents": 8, "expert": 5.0, "parent": 4.0, "seed": 4.5}
    measured = {"own": {"de": figures, "fr": figures}}

    def command(run: Path) -> int:
        arguments = [str(run) if word == "RUN" else word for word in words]
        with (
            mock.patch.object(publish, "evaluate_held_out", lambda *_: measured),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            return cli.main(arguments)

    shutil.copytree(template, folder / "first")
    command(folder / "first")  # imports everything that the command needs
    for number in range(MOST):
        run = folder / str(number)
        shutil.copytree(template, run)
        first = _forked(functools.partial(command, run), number)
        faults = [str(fault) for fault in verify(run)]
        statuses = {e.reference: e.status for e in Registry.load(run).experts}
        files = [path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()]
        found = {"killed": first == KILLED, "code": first, "faults": faults}
        found |= {"statuses": statuses, "files": files}
        if first == KILLED:
            found["again"] = _forked(functools.partial(command, run))
        found["faults at last"] = [str(fault) for fault in verify(run)]
        print(json.dumps(found), flush=True)
        if first != KILLED:
            return
    raise SystemExit(f"the command has more than {MOST} operations")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
