"""Requests that one set of models answers together, and the events that they cause.

A batch knows no threads and no queue: those are the scheduler's.
"""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from clustering.errors import UserError
from xelm.inference.decoder import out_of_memory
from xelm.inference.generation import Continuation, Generator
from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.prompt_scoring import PromptScores, score_prompts
from xelm.inference.reading import prompt_tokens_per_step
from xelm.inference.running import GenerationRequest
from xelm.inference.sampling import TokenLikelihood
from xelm.serving.limits import Limits
from xelm.serving.models import ServedModels
from xelm.serving.scoring_queue import NoMemory, ScoringJob, ScoringQueue

LATE = "the time limit passed while the request waited"
"""Message of a request that failed before anything of it was generated."""
KEPT_TEXTS = 8
"""Number of sequences of each expert that stay in memory when they have ended, for prompts that
begin as they do."""


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Event: the prompt's tokens have log probabilities."""

    likelihoods: Sequence[TokenLikelihood]
    """One for each token of the prompt."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Event: the text has grown."""

    text: str
    weights: Mapping[str, float]
    """Model -> its routing weight for the last token of the text."""
    router: str
    """Name of the router that decided most tokens so far."""
    likelihoods: Sequence[TokenLikelihood] = ()
    """Tokens since the last event, where their log probabilities are wanted."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Event: the text is complete."""

    reason: Literal["stop", "length"]
    tokens: int
    """Number of generated tokens."""
    weights: Mapping[str, float]
    """Model -> its mean routing weight over these tokens, or over a prompt that was only scored."""
    router: str
    """Name of the router that decided most of these tokens; empty where none was routed."""
    likelihoods: Sequence[TokenLikelihood] = ()
    """Tokens since the last event, where their log probabilities are wanted."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Event: the request failed, and no other event follows."""

    status: int
    """HTTP status."""
    message: str


Event = PromptScored | TextDelta | Finished | Failed


@dataclass(eq=False, kw_only=True, slots=True)
class Request(GenerationRequest):
    """One prompt that is to be continued. (One HTTP request may become several, with numbers.)"""

    model: str
    """Name of a served model."""
    scores_prompt: bool = False
    """Whether log probabilities of the prompt's tokens are wanted."""
    generates: bool = True
    """Whether any token is to be generated."""
    on_event: Callable[[Event], None]
    """Called with each event, in order."""
    deadline: float
    """Time, by time.monotonic, after which the request ends."""
    pool: str | None = None
    """Key of the pool that reads the prompt, as in `ServedModels.pools`."""
    cancelled: bool = False


def still_waiting(request: Request, emit: Callable[[Request, Event], None]) -> bool:
    """Whether a request that waits is kept; it fails when its time is up."""
    if request.deadline < time.monotonic() and not request.cancelled:
        emit(request, Failed(503, LATE))
        return False
    return not request.cancelled


class Batch:
    """Requests that one set of models answers together; they join and leave at any token."""

    def __init__(
        self,
        models: ServedModels,
        limits: Limits,
        scoring: ScoringQueue,
        emit: Callable[[Request, Event], None],
    ):
        """scoring: in which prompts are scored. emit: called with each event and its request."""
        self.models, self._scoring, self._emit = models, scoring, emit
        self._pools = models.pools
        budget = limits.prompt_tokens_per_step or prompt_tokens_per_step()
        self._generators = {
            key: Generator(pool, prompt_tokens=budget, keep=KEPT_TEXTS)
            for key, pool in self._pools.items()
        }
        self._generating: dict[Continuation, Request] = {}
        self._to_score: list[Request] = []
        """Requests whose prompts are to be scored before they are continued."""
        self._jobs: dict[ScoringJob, list[Request]] = {}
        """Requests whose prompts are being scored together."""

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def requests(self) -> list[Request]:
        """All requests of the batch."""
        scored = [request for some in self._jobs.values() for request in some]
        return [*self._generating.values(), *scored, *self._to_score]

    @property
    def generating(self) -> bool:
        """Whether any sequence is being generated."""
        return bool(self._generating)

    @property
    def growing(self) -> bool:
        """Whether any sequence waits for its next token after the first."""
        return any(one.sequence.new_tokens for one in self._generating)

    @property
    def reading(self) -> bool:
        """Whether any prompt is being read to be continued."""
        return any(not one.sequence.new_tokens for one in self._generating)

    def close(self) -> None:
        """Frees the memory of all sequences."""
        for job in self._jobs:
            self._scoring.remove(job)
        for generator in self._generators.values():
            generator.engine.close()

    def add(self, request: Request) -> None:
        """Adds a request to the batch."""
        if request.scores_prompt and self.models.router(request.model, request.pool):
            self._to_score.append(request)
        else:
            self._generate(request)

    def remove_abandoned(self) -> None:
        """Removes requests that were cancelled, and those whose time passed before anything was
        generated, which fail."""
        for continuation, request in list(self._generating.items()):
            waits = not continuation.sequence.new_tokens  # its prompt is not read completely
            if request.cancelled or (waits and not still_waiting(request, self._emit)):
                del self._generating[continuation]
                self._generators[request.pool].remove(continuation)
        self._to_score = [r for r in self._to_score if still_waiting(r, self._emit)]
        for job, some in list(self._jobs.items()):
            self._jobs[job] = [request for request in some if still_waiting(request, self._emit)]
            if not self._jobs[job]:
                del self._jobs[job]
                self._scoring.remove(job)

    def score(self, most: float) -> None:
        """Begins to score the prompts that wait for it, those together that have at most so many
        tokens and follow each other."""
        parts: list[list[Request]] = []
        tokens = 0
        for request in self._to_score:
            tokens += len(request.ids)
            if not parts or tokens > most or request.pool != parts[-1][0].pool:
                parts.append([])
                tokens = len(request.ids)
            parts[-1].append(request)
        self._to_score = []
        for part in parts:
            self._begin_scoring(part)

    def _begin_scoring(self, requests: Sequence[Request]) -> None:
        routers = (self.models.router(request.model, request.pool) for request in requests)
        pool, account = self._pools[requests[0].pool], self._pools[requests[0].pool].parameters
        begin = partial(
            score_prompts,
            pool,
            [request.ids for request in requests],
            [router for router in routers if router is not None],
            [request.language for request in requests],
            max(request.alternatives or 0 for request in requests),
        )
        job = ScoringJob(
            begin=begin,
            tokens=sum(len(request.ids) for request in requests),
            done=lambda scores: self._scored(job, requests, scores),
            failed=lambda error: self._not_scored(job, error),
            memory=account if isinstance(account, ParameterCache) else None,
        )
        self._jobs[job] = list(requests)
        self._scoring.add(job)

    def _scored(
        self, job: ScoringJob, requests: Sequence[Request], scores: Sequence[PromptScores]
    ) -> None:
        """Begins to continue prompts that were scored, as far as their requests have not left."""
        left = self._jobs[job]
        for request, score in zip(requests, scores):
            if request not in left:
                continue
            count = request.alternatives or 0
            tops = [token._replace(top=token.top[:count]) for token in score.tokens]
            self._emit(request, PromptScored(tops))
            weights = _weights_by_name(list(score.weights), np.array([*score.weights.values()]))
            self._generate(request, Finished("length", 0, weights, score.router))
            left.remove(request)
        del self._jobs[job]

    def _not_scored(self, job: ScoringJob, error: Exception) -> None:
        """Fails requests whose prompts could not be scored; no others depend on what was read."""
        failed = Failed(500, "scoring failed; try again")
        if isinstance(error, NoMemory):
            failed = Failed(503, str(error))
        elif out_of_memory(error):
            failed = Failed(503, "the device is out of memory; try again")
        else:
            traceback.print_exception(error)
        for request in self._jobs.pop(job):
            self._emit(request, failed)

    def _generate(self, request: Request, unless: Finished | None = None) -> None:
        """Begins to continue a prompt. unless: the event where no token is to be generated."""
        router = self.models.router(request.model, request.pool)
        if router is None:  # withdrawn while the request waited
            self._emit(request, Failed(404, f"the model {request.model!r} is no longer served"))
            return
        if not request.generates:
            self._emit(request, unless or Finished("length", 0, {}, ""))
            return
        try:
            generator = self._generators[request.pool]
            continuation = generator.add(request, router, request.deadline)
        except UserError as error:
            self._emit(request, Failed(400, str(error)))
            return
        self._generating[continuation] = request

    def step(self, tokens_read: float = 0) -> int:
        """Generates a token of every sequence whose prompt is read, and reads more of the others;
        returns the number of tokens. A sequence for which there is no memory fails, and one for
        which an expert computes no probabilities. tokens_read: as in `Engine.step`."""
        running = [each for each in self._generators.values() if each.running]
        deltas = [delta for generator in running for delta in generator.step(tokens_read)]
        for one, text, weights in deltas:
            request, router = self._generating[one], one.sequence.routing
            names = self._pools[request.pool].names
            if text:
                found = _weights_by_name(names, weights)
                self._emit(request, TextDelta(text, found, router, one.take_likelihoods()))
            if one.finish_reason:
                mean, tokens = _weights_by_name(names, one.mean_weights), one.sequence.new_tokens
                rest = one.take_likelihoods()
                self._emit(request, Finished(one.finish_reason, tokens, mean, router, rest))
                del self._generating[one]
        for generator in running:
            for one, error in generator.take_failed():
                status = 503 if isinstance(error, MemoryError) else 500
                self._emit(self._generating.pop(one), Failed(status, str(error)))
        return len(deltas)


def _weights_by_name(names: Sequence[str], weights: np.ndarray) -> dict[str, float]:
    """Model -> its weight, for weights that do not round to zero."""
    return {names[i]: round(float(weights[i]), 4) for i in np.flatnonzero(weights > 5e-5).tolist()}
