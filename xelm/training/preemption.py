"""Ending early: on SIGTERM (of a machine that is taken away) or Ctrl-C a training saves first."""

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
"""Seconds after a signal during which the same one again counts as one request."""
_STEPS = itertools.count()
"""Numbers of the steps of all trainings in this process: hosts agree on one still to come."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):
    """Raised when a training ended on request, with all its work saved."""

    def __init__(self, message: str, *, by: int = signal.SIGTERM):
        """by: the signal that requested it."""
        super().__init__(message)
        self.by = by


@contextmanager
def preemption(label: str) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns, once a step, whether this process was requested to end. If it
    was, leaving this context without an error raises `Preempted`. The same signal again, some
    seconds after the first, ends the process as without this. Several hosts that take their steps
    together all learn of a SIGTERM at the same step; Ctrl-C is not shared.

    Python handles signals in its main thread only; in other threads the answer is always no.
    """
    # Imported here, since the command line needs `Preempted` before it imports anything heavy.
    import jax
    from jax.experimental import multihost_utils

    requested = False
    by = signal.SIGTERM
    received: dict[int, float] = {}  # signal -> when, by a clock
    before: dict[int, Any] = {}

    def agreed() -> bool:
        nonlocal requested
        if multihost_utils.reached_preemption_sync_point(next(_STEPS)):
            requested = True
        return requested

    def handle(number: int, frame: object) -> None:
        nonlocal requested, by
        # What ends a group of processes may send two signals: its own, and one by their parent,
        # which on a busy machine comes long after it.
        now = time.monotonic()
        if number in received and now > received[number] + _SAME_SECONDS:
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)
            return
        received.setdefault(number, now)
        if not requested:
            requested, by = True, signal.Signals(number)
            if number == signal.SIGINT:
                print(
                    f"\n{label}: saving after this step; Ctrl-C again, {_SAME_SECONDS:g} seconds "
                    "from now, ends without",
                    file=sys.stderr,
                )

    several = jax.process_count() > 1
    if not several and threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            # None stands for a handler that was not made in Python.
            before[number] = signal.signal(number, handle) or signal.SIG_DFL
    try:
        yield agreed if several else lambda: requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if requested:
        raise Preempted(
            f"{label} was stopped by a signal; it is saved, and resumes when run again", by=by
        )
