"""A machine that is taken away asks its processes to end (SIGTERM): a training saves first."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SAME_SECONDS = 5.0
_STEPS = itertools.count()
"""Of all trainings of this process: hosts agree on a number that is still to come."""


class Preempted(Exception):
    """A training ended because it was asked to, with all it did saved."""


@contextmanager
def preemption(label: str) -> Iterator[Callable[[], bool]]:
    """A function that says, once a step, whether this process has been asked to end. Who was asked
    in here, and leaves without a fault, leaves by `Preempted`; at a second SIGTERM, some seconds
    after the first, the process ends at once. Of several hosts that take their steps together, all
    are told at the same step.

    Python hears signals in its main thread alone; elsewhere the answer is no.
    """
    # Here, since the command line knows of `Preempted` before anything heavy is imported.
    import jax
    from jax.experimental import multihost_utils

    asked = 0.0  # when, by a clock; 0 is never
    if jax.process_count() > 1:

        def agreed() -> bool:
            nonlocal asked
            if multihost_utils.reached_preemption_sync_point(next(_STEPS)):
                asked = time.monotonic()
            return asked > 0

        yield agreed
        _leave(label, asked)
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def hear(number: int, frame: object) -> None:
        nonlocal asked
        # Whoever ends a group of processes may ask twice: itself, and by their parent.
        if asked and time.monotonic() > asked + _SAME_SECONDS:
            signal.signal(signal.SIGTERM, before)
            os.kill(os.getpid(), signal.SIGTERM)
        asked = asked or time.monotonic()

    # None: of a handler that was not made in Python.
    before = signal.signal(signal.SIGTERM, hear) or signal.SIG_DFL
    try:
        yield lambda: asked > 0
    finally:
        signal.signal(signal.SIGTERM, before)
    _leave(label, asked)


def _leave(label: str, asked: float) -> None:
    if asked:
        raise Preempted(f"{label} was asked to end; it is saved, and goes on when run again")
