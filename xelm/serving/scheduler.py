"""The scheduler: queues requests and has batches of them generated, in a thread of its own.

Requests join and leave a batch at any token (continuous batching: Yu et al. 2022, Orca).
"""

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from xelm.inference.reading import out_of_memory
from xelm.serving.batch import Batch, Event, Failed, Request, still_waiting
from xelm.serving.limits import Limits
from xelm.serving.models import ServedModels

TOKENS_SCORED = 4096
"""Largest number of prompt tokens that are scored at a time, unless one prompt has more."""
TOKENS_SCORED_BETWEEN_STEPS = 512
"""The same while sequences are being generated, which wait meanwhile."""


T = TypeVar("T")


class QueueFull(Exception):
    """Raised where more requests wait than may."""


class ShuttingDown(Exception):
    """Raised where no request is accepted any more."""


class Scheduler:
    """Queue of requests, and the batches in which they are answered."""

    def __init__(
        self,
        models: ServedModels,
        limits: Limits,
        call_soon: Callable[[Callable[[], None]], object],
    ):
        """call_soon: runs a function in the thread that receives events."""
        self._limits, self._call_soon = limits, call_soon
        self._changed = threading.Condition()
        self._queue: deque[Request] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._batches = [self._batch(models)]
        """Last the batch that new requests join; before it those of models that were replaced."""
        self._events: list[tuple[Request, Event]] = []
        self._adding: Request | None = None
        self._closing = False
        self.preparing = False
        """Whether other models are being prepared: files are checked, routers fitted."""
        self.count: Callable[[str, int], object] = lambda kind, tokens: None
        """Called with a kind, "prompt" or "completion", and a number of tokens of that kind."""
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def models(self) -> ServedModels:
        """The models that answer new requests."""
        return self._batches[-1].models

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Number of requests that are being answered."""
        return sum(len(batch) for batch in list(self._batches))

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues all of some requests, whose prompts `check_prompt` accepts, or none. Raises
        QueueFull if too many wait, ShuttingDown at the end, and UserError for a language that the
        router of a request refuses."""
        models = self.models
        for request in requests:
            if request.model in models.routers:  # otherwise it has just been withdrawn
                models.routers[request.model].start(request.language)
        with self._changed:
            self._check_space(len(requests))
            self._queue += requests
            self._changed.notify()

    def call(self, function: Callable[[], T]) -> T:
        """What a function returns in which models read, which belong to the scheduler's thread: it
        is called there between two steps, and this waits for it. Raises what the function raises,
        and QueueFull or ShuttingDown where a request would not be queued."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            self._check_space(1)
            self._calls.append(run)
            self._changed.notify()
        return future.result()

    def _check_space(self, count: int) -> None:
        """Raises QueueFull or ShuttingDown where so many more requests are not queued."""
        free = self._limits.max_sequences - self.running
        dead = self._thread.ident is not None and not self._thread.is_alive()
        if self._closing or dead:
            raise ShuttingDown
        if len(self._queue) + count > self._limits.max_waiting + free:
            raise QueueFull

    def cancel(self, requests: Sequence[Request]) -> None:
        """Gives up some requests, whether they wait or are being answered."""
        with self._changed:
            for request in requests:
                request.cancelled = True
            self._changed.notify()

    def replace_models(self, models: ServedModels) -> None:
        """Has new requests answered by other models, and those in progress by theirs."""
        with self._changed:
            self._batches.append(self._batch(models))
            self._changed.notify()

    def close(self) -> None:
        """Cancels all requests and ends the thread. To finish them first, wait for the clients."""
        with self._changed:
            self._closing = True
            for request in [*self._running(), *self._queue]:
                request.cancelled = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                if not self._schedule():
                    return
                if self._calls:
                    self._calls.popleft()()
                for batch in list(self._batches):
                    # Not all prompts at once: running sequences wait for their next token.
                    generating = any(other.generating for other in self._batches)
                    batch.score_some(TOKENS_SCORED_BETWEEN_STEPS if generating else TOKENS_SCORED)
                    if batch.generating:
                        self.count("completion", batch.step())
            except Exception as error:
                self._fail_running(error)
            self._deliver()

    def _schedule(self) -> bool:
        """Waits until there is work, removes requests that are over, and moves others from the
        queue into the batch. False when all is done."""
        with self._changed:
            while not self._queue and not self.running and not self._calls:
                self._retire()
                if self._closing:
                    return False
                self._changed.wait()
            for batch in self._batches:
                batch.remove_abandoned()
            self._retire()
            self._queue = deque(r for r in self._queue if still_waiting(r, self._emit))
            while self._queue and self.running < self._limits.max_sequences:
                request = self._adding = self._queue.popleft()
                self.count("prompt", len(request.ids))
                self._batches[-1].add(request)
                self._adding = None
        return True

    def _batch(self, models: ServedModels) -> Batch:
        return Batch(models, self._limits, self._emit)

    def _retire(self) -> None:
        """Drops the batches of replaced models that are empty, and what only they loaded."""
        batches = [batch for batch in self._batches[:-1] if len(batch)] + self._batches[-1:]
        for batch in self._batches:
            if batch not in batches:
                batch.close()
        if len(batches) == 1 < len(self._batches):
            self.models.evict_others()
        self._batches = batches

    def _fail_running(self, error: Exception) -> None:
        """Fails the requests that are being answered: nothing that an error left behind can be
        relied on. Those that wait are answered afterwards."""
        traceback.print_exc(file=sys.stderr)
        memory = out_of_memory(error)
        why = "the device is out of memory" if memory else "generation failed"
        with self._changed:
            for request in self._running():
                self._emit(request, Failed(503 if memory else 500, f"{why}; try again"))
            self._adding = None
            for batch in self._batches:
                batch.close()
            self._batches = [self._batch(self.models)]
            self.models.evict_others()

    def _running(self) -> list[Request]:
        """The requests in a batch, and the one that is being added to one, each once."""
        running = [request for batch in self._batches for request in batch.requests]
        return list(dict.fromkeys(running + ([self._adding] if self._adding else [])))

    def _emit(self, request: Request, event: Event) -> None:
        """Keeps an event until `_deliver` passes it on."""
        self._events.append((request, event))

    def _deliver(self) -> None:
        """Passes events on to their requests, in the thread that receives them."""
        events, self._events = self._events, []
        if not events:
            return

        def call() -> None:
            for request, event in events:
                if not request.cancelled:
                    request.on_event(event)

        self._call_soon(call)
