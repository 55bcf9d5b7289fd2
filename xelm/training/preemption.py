"""A request to end, SIGTERM of a machine that is taken away or Ctrl-C: a training saves first."""

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SAME_SECONDS = 5.0
_STEPS = itertools.count()
"""Of all trainings of this process: hosts agree on a number that is still to come."""


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):
    """A training ended because it was asked to, with all it did saved."""

    def __init__(self, message: str, *, by: int = signal.SIGTERM):
        """by: the signal that asked."""
        super().__init__(message)
        self.by = by


@contextmanager
def preemption(label: str) -> Iterator[Callable[[], bool]]:
    """A function that says, once a step, whether this process has been asked to end. Who was asked
    in here, and leaves without a fault, leaves by `Preempted`; at a second request, some seconds
    after the first, the process ends as it would have without this. Of several hosts that take
    their steps together, all are told at the same step, of SIGTERM alone.

    Python hears signals in its main thread alone; elsewhere the answer is no.
    """
    # Here, since the command line knows of `Preempted` before anything heavy is imported.
    import jax
    from jax.experimental import multihost_utils

    asked = 0.0  # when, by a clock; 0 is never
    by = signal.SIGTERM
    if jax.process_count() > 1:

        def agreed() -> bool:
            nonlocal asked
            if multihost_utils.reached_preemption_sync_point(next(_STEPS)):
                asked = time.monotonic()
            return asked > 0

        yield agreed
        _leave(label, asked, by)
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def hear(number: int, frame: object) -> None:
        nonlocal asked, by
        # Whoever ends a group of processes may ask twice: itself, and by their parent.
        if asked and time.monotonic() > asked + _SAME_SECONDS:
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)
        elif not asked:
            asked, by = time.monotonic(), signal.Signals(number)
            if number == signal.SIGINT:
                print(
                    f"\n{label}: saving after this step; Ctrl-C again, {_SAME_SECONDS:g} seconds "
                    "from now, ends without",
                    file=sys.stderr,
                )

    # None: of a handler that was not made in Python.
    before: dict[int, Any] = {
        number: signal.signal(number, hear) or signal.SIG_DFL for number in _SIGNALS
    }
    try:
        yield lambda: asked > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    _leave(label, asked, by)


def _leave(label: str, asked: float, by: int) -> None:
    if asked:
        raise Preempted(f"{label} was asked to end; it is saved, and goes on when run again", by=by)
