"""Reloading: a server takes up what is published, rolled back or grown while it runs."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from clustering.errors import UserError
from xelm.serving.metrics import Metrics
from xelm.serving.models import ServedModels
from xelm.serving.scheduler import Scheduler

INTERVAL_SECONDS, LONGEST_RETRY_SECONDS = 2.0, 60.0
"""Time between two checks of the registry; longest time until a refused one is tried again."""

Opener = Callable[..., ServedModels]
"""Opens the models that the registry lists, with the options `before` and `report` of
`open_served_models`."""

FileState = tuple[int, int, int] | None


def file_state(file: Path) -> FileState:
    """Values that change when a file does; None where there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class RegistryWatcher(threading.Thread):
    """Thread that checks whether the registry has changed, and has its models served."""

    def __init__(
        self,
        registry: Path,
        state: FileState,
        opener: Opener,
        scheduler: Scheduler,
        metrics: Metrics,
    ):
        """registry: the file. state: its state before the scheduler's models were opened."""
        super().__init__(name="registry watcher", daemon=True)
        self._registry, self._state, self._opener = registry, state, opener
        self._scheduler, self._metrics = scheduler, metrics
        self._stopped = threading.Event()
        self._retry_at, self._retry_seconds, self._refusal = math.inf, INTERVAL_SECONDS, ""

    def run(self) -> None:
        while not self._stopped.wait(INTERVAL_SECONDS):
            self.check()

    def check(self) -> None:
        """Has a changed registry served, or refuses it with one line and changes nothing."""
        state = file_state(self._registry)
        if state == self._state and time.monotonic() < self._retry_at:
            return
        before, started = self._scheduler.models, time.monotonic()
        if state != self._state:
            # No request waits for it, but it may take a while: routers are fitted to new experts.
            print("the registry has changed: preparing its models", file=sys.stderr, flush=True)
        self._state, self._retry_at = state, math.inf
        self._scheduler.preparing = True
        try:
            models = self._opener(before=before)
        except Exception as error:
            # Files that are missing may still be on their way.
            self._retry_seconds = min(2 * self._retry_seconds, LONGEST_RETRY_SECONDS)
            self._retry_at = time.monotonic() + self._retry_seconds
            what = str(error) if isinstance(error, UserError) else repr(error)
            if what != self._refusal:
                print(f"the changed registry is refused: {what}", file=sys.stderr, flush=True)
                self._metrics.reloads.labels("refused").inc()
            self._refusal = what
            return
        finally:
            self._scheduler.preparing = False
        self._refusal, self._retry_seconds = "", INTERVAL_SECONDS
        if models is before:
            return
        self._scheduler.replace_models(models)
        self._metrics.reloads.labels("accepted").inc()
        seconds = time.monotonic() - started
        versions = ", ".join(models.versions.values())
        print(f"now serving {versions}; prepared in {seconds:.1f} s", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Ends the thread, if it was started."""
        self._stopped.set()
        if self.ident is not None:
            self.join()
