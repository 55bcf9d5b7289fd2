"""Computations that are done in parts, so that others can go on in between."""

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

Work = Generator[None, None, T]
"""A computation that pauses (`yield`) where its `Allowance` is used up, and returns its result."""


@dataclass(eq=False, slots=True)
class Allowance:
    """How many tokens a computation may read before it pauses."""

    left: float = math.inf
    """Number of tokens, each counted for each model that reads it; below zero where the last piece
    was larger than what was left."""
    lacks_memory: bool = False
    """Whether the computation has paused because there is no memory for its caches."""

    def wait(self) -> Work[None]:
        """Pauses until something is left."""
        while self.left <= 0:
            yield


def finish(work: Work[T]) -> T:
    """The result of a computation whose allowance has no limit."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
