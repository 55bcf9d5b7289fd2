"""Checkpoints of unfinished trainings: the one place that knows Orbax."""

import errno
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from clustering.errors import UserError
from clustering.files import read_json, sha256, write_json
from xelm.training.hosts import is_first, wait_for_all

_ITEMS = ("state", "facts")
_SEAL = "sha256.json"


class Checkpoints:
    """The checkpoints of one training under one folder: written in the background, each complete
    or absent."""

    def __init__(self, directory: str | Path, keep: int = 2, keep_every: int = 0):
        """Keeps the `keep` newest, and those of every multiple of `keep_every` steps if it is not
        0."""
        self.directory = Path(directory).absolute()
        self._saved = 0
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every or None,
                create=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Saves arrays and a JSON value; returns when the arrays may be changed again."""
        if step != self._manager.latest_step():
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state), facts=ocp.args.JsonSave(facts)
            )
            with self._saving():
                # Waits for the save before, so `_seal` does not meet the number of another.
                self._manager.wait_until_finished()
                self._saved = step
                self._manager.save(step, args=args)

    def _seal(self) -> None:
        """Adds the hash of every file, before Orbax gives the checkpoint its name."""
        if not is_first():
            return
        for folder in self.directory.glob(f"{self._saved}.orbax-checkpoint-tmp*"):
            files = sorted(path for name in _ITEMS for path in (folder / name).rglob("*"))
            sums = {p.relative_to(folder).as_posix(): sha256(p) for p in files if p.is_file()}
            write_json(folder / _SEAL, {"format": 1, "sha256": sums})

    def _check_seal(self, step: int) -> None:
        """Raises ValueError for a file that is not as it was written."""
        folder = self.directory / str(step)
        if not (folder / _SEAL).exists():  # of an earlier version
            return
        try:
            sums = read_json(folder / _SEAL)["sha256"]
        except UserError as error:
            raise ValueError(str(error)) from error
        for name, wanted in sums.items():
            if not (folder / name).is_file():
                raise ValueError(f"{name} is missing")
            if sha256(folder / name) != wanted:
                raise ValueError(f"{name} is not as it was written")

    def newest(
        self, like: Callable[[dict[str, Any]], Any]
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Step, state and facts of the newest checkpoint that can be read; None if there is none.
        `like` sees the facts first: it may refuse them, or tells the shapes and shardings of the
        state. A damaged checkpoint is named on stderr, and moved aside once one before it could be
        read."""
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                self._check_seal(step)
                facts = self._restored(step, facts=ocp.args.JsonRestore())
                state = self._restored(step, state=ocp.args.StandardRestore(like(facts)))
            except Exception as error:
                if not _of_the_file(error):
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                damaged.append(f"the checkpoint of step {step} is damaged ({reason})")
                continue
            for line in damaged if is_first() else ():
                print(f"{self.directory}: {line}; going back", file=sys.stderr)
            if damaged:
                self._move_aside(after=step)
            return step, state, facts
        if damaged:
            raise UserError(
                f"{self.directory}: {'; '.join(damaged)}; delete the folder to start over"
            )
        return None

    def _move_aside(self, after: int) -> None:
        """Checkpoints that could not be read are in the way of those to come, but not for us to
        delete: perhaps the disk is at fault."""
        folder = self.directory
        wait_for_all(f"{folder} was read")
        for step in [step for step in self._manager.all_steps() if step > after and is_first()]:
            aside = folder.with_name(f"damaged-{step}")
            shutil.rmtree(aside, ignore_errors=True)
            (folder / str(step)).rename(aside)
        wait_for_all(f"{folder} was moved")
        self._manager.reload()

    def _restored(self, step: int, **what: Any) -> Any:
        (name,) = what
        return self._manager.restore(step, args=ocp.args.Composite(**what))[name]

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        with self._saving():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        self._manager.close()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        # Saving goes on in the background: what failed is raised by a later call.
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot save a checkpoint in {self.directory}: "
                f"{str(error).splitlines()[0]}; the last complete one is kept"
            ) from error


def _of_the_file(error: Exception) -> bool:
    """Whether a checkpoint that raised this when read is itself at fault. A damaged file makes its
    readers raise all sorts of things, but too little memory or a failing disk says nothing of it.
    """
    if isinstance(error, OSError):
        return error.errno in (None, errno.ENOENT)
    return not isinstance(error, UserError | MemoryError | jax.errors.JaxRuntimeError)
