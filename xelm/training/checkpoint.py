"""Checkpoints of unfinished trainings: the one place that knows Orbax."""

from collections.abc import Iterator
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

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, if there is one."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Saves arrays and a JSON value; returns when the arrays may be changed again."""
        if step != self._manager.latest_step():
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state), facts=ocp.args.JsonSave(facts)
            )
            with self._saving():
                self._manager.save(step, args=args)

    def restore(self, step: int, shapes: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """State and facts of a checkpoint, placed as `shardings` say."""
        target = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            shapes,
            shardings,
        )
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), facts=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError) as error:
            raise UserError(
                f"the checkpoint at step {step} in {self._manager.directory} does not fit this "
                f"model: {str(error).splitlines()[0]}"
            ) from error
        return restored["state"], restored["facts"]

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
