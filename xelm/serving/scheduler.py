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

from xelm.inference.decoder import TOKENS_A_CALL, out_of_memory
from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.piecewise import PiecewiseScorer
from xelm.inference.reading import prompt_tokens_per_step
from xelm.inference.work import Work
from xelm.serving.batch import Batch, Event, Failed, Request, still_waiting
from xelm.serving.limits import Limits
from xelm.serving.models import ServedModels
from xelm.serving.scoring_queue import ScoringJob, ScoringQueue

T = TypeVar("T")


class QueueFull(Exception):
    """Raised where more requests wait than may."""


class ShuttingDown(Exception):
    """Raised where no request is accepted any more."""


class Scheduler:
    """Queue of requests, and the batches in which they are answered."""

    def __init__(
        self,
        models: ServedModels | None,
        limits: Limits,
        call_soon: Callable[[Callable[[], None]], object],
    ):
        """models: None: those of `replace_models`, before which nothing can be submitted.
        call_soon: runs a function in the thread that receives events."""
        self._limits, self._call_soon = limits, call_soon
        self._changed = threading.Condition()
        self._queue: deque[Request] = deque()
        self._new_calls: deque[tuple[Future, ScoringJob]] = deque()
        self._calls: dict[Future, ScoringJob] = {}
        """Calls in progress."""
        self._scoring = ScoringQueue()
        self._prompt_tokens = limits.prompt_tokens_per_step or prompt_tokens_per_step()
        self._batches = [] if models is None else [self._batch(models)]
        """Last the batch that new requests join; before it those of models that were replaced."""
        self._events: list[tuple[Request, Event]] = []
        self._adding: Request | None = None
        self._closing = False
        self.stage = "loading"
        """What is being done before the first models answer requests."""
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
    def ready(self) -> bool:
        """Whether there are models to answer requests."""
        return bool(self._batches)

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

    def call(
        self,
        begin: Callable[[PiecewiseScorer], Work[T]],
        tokens: int = 0,
        memory: ParameterCache | None = None,
    ) -> Future[T]:
        """Has models read prompts, in the scheduler's thread, to which they belong, in pieces
        between its steps; returns the result to come, which is given up when that is cancelled.
        Raises QueueFull or ShuttingDown where a request would not be queued.

        begin, tokens, memory: as in `ScoringJob`."""
        future: Future[T] = Future()
        job = ScoringJob(
            begin=begin,
            tokens=tokens,
            done=lambda result: self._end_call(future, result=result),
            failed=lambda error: self._end_call(future, error=error),
            memory=memory,
        )
        with self._changed:
            self._check_space(1)
            self._new_calls.append((future, job))
            self._changed.notify()
        return future

    def _end_call(
        self, future: Future, *, result: object = None, error: Exception | None = None
    ) -> None:
        del self._calls[future]
        if not future.set_running_or_notify_cancel():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

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
        """Has new requests answered by other models, and those in progress by theirs; or has the
        first models answer requests."""
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
                tokens_read = self._score()
                for batch in list(self._batches):
                    if batch.generating:
                        self.count("completion", batch.step(tokens_read))
            except Exception as error:
                self._fail_running(error)
            self._deliver()

    def _score(self) -> float:
        """Goes on with prompts that are read before anything is generated; returns the number of
        tokens that were read. They share the budget of a step with prompts that are read to be
        continued, each half of it where there are both."""
        growing = any(batch.growing for batch in self._batches)
        budget = self._prompt_tokens if growing else max(self._prompt_tokens, TOKENS_A_CALL)
        for batch in self._batches:
            batch.score(budget)
        reading = any(batch.reading for batch in self._batches)
        return self._scoring.advance(budget / 2 if reading else budget)

    def _schedule(self) -> bool:
        """Waits until there is work, removes requests that are over, and moves others from the
        queue into the batch. False when all is done."""
        with self._changed:
            while not (self._queue or self.running or self._calls or self._new_calls):
                self._retire()
                if self._closing:
                    return False
                self._changed.wait()
            self._schedule_calls()
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

    def _schedule_calls(self) -> None:
        """Begins new calls, and gives up those that are cancelled; at the end all of them."""
        while self._new_calls:
            future, job = self._new_calls.popleft()
            self._calls[future] = job
            self._scoring.add(job)
        for future, job in list(self._calls.items()):
            if future.cancelled() or self._closing:
                self._scoring.remove(job)
                self._end_call(future, error=ShuttingDown())

    def _batch(self, models: ServedModels) -> Batch:
        return Batch(models, self._limits, self._scoring, self._emit)

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
