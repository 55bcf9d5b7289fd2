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


class Checkpoints:
    """The checkpoints of one training under one folder: written in the background, each complete
    or absent. The two newest are kept."""

    def __init__(self, directory: str | Path):
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True),
        )

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Saves arrays and a JSON value; returns when the arrays may be changed again."""
        if step != self._manager.latest_step():
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state), facts=ocp.args.JsonSave(facts)
            )
            with self._saving():
                self._manager.save(step, args=args)

    def newest(
        self, shapes: Any, shardings: Any, check: Callable[[dict[str, Any]], None]
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Step, state and facts of the newest checkpoint that can be read, placed as `shardings`
        say; None if there is none. `check` sees the facts first and may refuse them. A damaged
        checkpoint is named on stderr, and moved aside once one before it could be read."""
        target = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            shapes,
            shardings,
        )
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                facts = self._restored(step, facts=ocp.args.JsonRestore())
                check(facts)
                state = self._restored(step, state=ocp.args.StandardRestore(target))
            except Exception as error:
                if not _of_the_file(error):
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                damaged.append(f"the checkpoint of step {step} is damaged ({reason})")
                continue
            for line in damaged:
                print(f"{self._manager.directory}: {line}; going back", file=sys.stderr)
            self._move_aside(after=step)
            return step, state, facts
        if damaged:
            raise UserError(
                f"{self._manager.directory}: {'; '.join(damaged)}; delete the folder to start over"
            )
        return None

    def _move_aside(self, after: int) -> None:
        """Checkpoints that could not be read are in the way of those to come, but not for us to
        delete: perhaps the disk is at fault."""
        folder = Path(self._manager.directory)
        for step in [step for step in self._manager.all_steps() if step > after]:
            aside = folder.with_name(f"damaged-{step}")
            shutil.rmtree(aside, ignore_errors=True)
            (folder / str(step)).rename(aside)
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
                f"cannot save a checkpoint in {self._manager.directory}: "
                f"{str(error).splitlines()[0]}; the last complete one is kept"
            ) from error


def _of_the_file(error: Exception) -> bool:
    """Whether a checkpoint that raised this when read is itself at fault. A damaged file makes its
    readers raise all sorts of things, but too little memory or a failing disk says nothing of it.
    """
    if isinstance(error, OSError):
        return error.errno in (None, errno.ENOENT)
    return not isinstance(error, UserError | MemoryError | jax.errors.JaxRuntimeError)
