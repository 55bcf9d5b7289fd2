"""Checkpoints of unfinished trainings; the only module that imports Orbax."""

import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from clustering.errors import UserError, first_line
from xelm.training.fingerprint import fingerprints
from xelm.training.hosts import is_first, wait_for_all

_FINGERPRINTS = "fingerprints"
_SEAL = "sha256"


class Checkpoints:
    """The checkpoints of one training under one folder: written in the background, each complete or
    absent."""

    def __init__(self, directory: str | Path, keep: int = 2, keep_every: int | None = None):
        """Keeps the `keep` newest, and those of every multiple of `keep_every` steps if given."""
        self.directory = Path(directory).absolute()
        self.best: int | None = None
        """Step of a checkpoint that is kept too."""
        policies = [LatestN(keep), _Best(self)]
        policies += [EveryNSteps(keep_every)] if keep_every else []
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies)
            ),
        )

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Saves arrays and a JSON value; returns when both may be changed again."""
        if step != self._manager.latest_step():
            # A copy, as it is written later than it is hashed.
            facts = json.loads(json.dumps({**facts, _FINGERPRINTS: fingerprints(state)}))
            sealed = ocp.args.JsonSave({**facts, _SEAL: _seal(facts)})
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), facts=sealed)
            with self._saving():
                self._manager.save(step, args=args)

    def restore(
        self, step: int, like: Callable[[dict[str, Any]], Any]
    ) -> tuple[Any, dict[str, Any]]:
        """State and facts of the checkpoint of a step. like: as in `newest`. UserError if it is
        missing or damaged."""
        try:
            return self._read(step, like)
        except Exception as error:
            if not _of_the_file(error):
                raise
            raise UserError(
                f"{self.directory}: the checkpoint of step {step}, the best on held-out text, is "
                f"damaged ({first_line(error)}); delete the folder to start over"
            ) from error

    def newest(
        self, like: Callable[[dict[str, Any]], Any]
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Step, state and facts of the newest checkpoint that can be read; None if there is none.
        `like` gets the facts first, and returns the shapes and shardings of the state or raises
        UserError. A damaged checkpoint is named on stderr, and moved aside once an older one could
        be read."""
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, facts = self._read(step, like)
            except Exception as error:
                if not _of_the_file(error):
                    raise
                damaged.append(f"the checkpoint of step {step} is damaged ({first_line(error)})")
                continue
            for line in damaged if is_first() else ():
                print(f"{self.directory}: {line}; using that of step {step}", file=sys.stderr)
            if damaged:
                self._move_aside(after=step)
            return step, state, facts
        if damaged:
            raise UserError(
                f"{self.directory}: {'; '.join(damaged)}; delete the folder to start over"
            )
        return None

    def _move_aside(self, after: int) -> None:
        """Moves aside checkpoints after a step, which could not be read and are in the way of later
        ones. They are not deleted: the fault may be the disk's."""
        folder = self.directory
        wait_for_all(f"{folder} was read")
        for step in self._manager.all_steps():
            if step > after and is_first():
                aside = folder.with_name(f"damaged-{step}")
                shutil.rmtree(aside, ignore_errors=True)
                (folder / str(step)).rename(aside)
        wait_for_all(f"{folder} was moved")
        self._manager.reload()

    def _read(self, step: int, like: Callable[[dict[str, Any]], Any]) -> tuple[Any, dict[str, Any]]:
        facts = self._restored(step, facts=ocp.args.JsonRestore())
        if facts.pop(_SEAL, None) != _seal(facts):
            raise ValueError("facts are not as they were written")
        state = self._restored(step, state=ocp.args.StandardRestore(like(facts)))
        _check_state(facts, state)
        return state, facts

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
                f"cannot save a checkpoint in {self.directory}: {first_line(error)}; the last "
                "complete one is kept"
            ) from error


@dataclass(frozen=True, slots=True)
class _Best:
    """Orbax's policy that keeps the best checkpoint."""

    checkpoints: Checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [each.step == self.checkpoints.best for each in checkpoints]


def _seal(facts: dict[str, Any]) -> str:
    """Hash of facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check_state(facts: dict[str, Any], state: Any) -> None:
    """Raises ValueError for arrays that are not as they were on the devices when saved."""
    wanted, found = facts[_FINGERPRINTS], fingerprints(state)
    changed = sorted(name for name in wanted if found.get(name) != wanted[name])
    if changed:
        raise ValueError(f"{', '.join(changed[:3])} not as written")


def _of_the_file(error: Exception) -> bool:
    """Whether a checkpoint that raised this when read is itself at fault. A damaged file makes its
    readers raise all sorts of things, but too little memory or a failing disk says nothing of it.
    """
    if isinstance(error, OSError):
        return error.errno in (None, errno.ENOENT)
    return not isinstance(error, UserError | MemoryError | jax.errors.JaxRuntimeError)
