"""Prompts that models read before anything is generated: to score them, or to choose a vocabulary.

They are read in pieces between the steps of generation, in turns: that which came first, so that
each is read in the end, and the shortest, so that no short one waits for a long one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.piecewise import PiecewiseScorer
from xelm.inference.work import Work


class NoMemory(Exception):
    """Raised where the caches of a prompt do not fit into the memory."""


@dataclass(eq=False, kw_only=True, slots=True)
class ScoringJob:
    """Some prompts that models read together."""

    begin: Callable[[PiecewiseScorer], Work[Any]]
    """Begins to read them from their beginnings."""
    tokens: int
    """Number of tokens of the prompts."""
    done: Callable[[Any], object]
    """Called with the result."""
    failed: Callable[[Exception], object]
    """Called with an error instead."""
    memory: ParameterCache | None = None
    """In whose account the caches are; None: memory is not limited."""
    scorer: PiecewiseScorer = field(init=False)
    """Reads the prompts."""
    work: Work[Any] = field(init=False)
    """The computation in progress."""

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins anew, without any memory."""
        self.scorer = PiecewiseScorer(self.memory)
        self.work = self.begin(self.scorer)


class ScoringQueue:
    """Jobs in progress, in the order in which they came."""

    def __init__(self) -> None:
        self._jobs: list[ScoringJob] = []
        self._shortest_first = True

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: ScoringJob) -> None:
        """Adds a job behind all others."""
        self._jobs.append(job)

    def remove(self, job: ScoringJob) -> None:
        """Gives up a job and frees its memory, if it has not ended."""
        if job in self._jobs:
            self._jobs.remove(job)
            job.work.close()

    def advance(self, tokens: float) -> float:
        """Goes on with jobs until so many tokens were read; returns how many were."""
        left = tokens
        self._shortest_first = not self._shortest_first
        order = list(self._jobs)
        if self._shortest_first:
            order.sort(key=lambda job: job.tokens)
        for job in order:
            if left <= 0:
                break
            if job in self._jobs:
                left = self._advance(job, left)
        return tokens - left

    def _advance(self, job: ScoringJob, left: float) -> float:
        """Goes on with one job; returns how many tokens may still be read."""
        allowance = job.scorer.allowance
        allowance.left, allowance.lacks_memory = left, False
        try:
            next(job.work)
        except StopIteration as end:
            self._jobs.remove(job)
            job.done(end.value)
        except Exception as error:
            self._jobs.remove(job)
            job.failed(error)
        else:
            if allowance.lacks_memory:
                self._make_space(job)
        return allowance.left

    def _make_space(self, job: ScoringJob) -> None:
        """Has the job that came last give its memory up to one that came before it. Sequences that
        are being generated have theirs until they end; if nobody else has any, the job fails."""
        later = self._jobs[self._jobs.index(job) + 1 :]
        if holding := [other for other in later if other.scorer.bytes]:
            holding[-1].work.close()
            holding[-1].restart()
        elif job.memory is None or job.memory.reserved <= job.scorer.bytes:
            free = 0.0 if job.memory is None else job.memory.device_bytes
            self.remove(job)
            job.failed(
                NoMemory(
                    f"the keys and values of a prompt of {job.tokens} tokens take more memory than "
                    f"there is beside the parameters of one model, of {free / 1e9:.2f} GB in all"
                )
            )
        elif job is not self._jobs[0]:
            # Those that came before it may need what it has.
            job.work.close()
            job.restart()
