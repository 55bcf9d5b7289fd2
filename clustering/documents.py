"""Documents in parts, and a sample of them that is the same wherever the parts are read.

Does not know how functions reach the parts (`engines`), or what is computed (`tfidf`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import islice, tee
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Integer

from clustering.engines import Engine
from clustering.errors import UserError

Part = Iterable[tuple[Any, str]]
"""Content and language of each document, as often as it is read. A part that goes to another
machine is pickled: it should say where its documents lie, not hold them."""
Terms = Callable[[Iterable[Any]], Iterable[np.ndarray]]
"""Contents of documents -> an integer array [tokens] of each."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of all parts, in the order of the parts."""

    parts: Sequence[Part]
    terms: Terms = iter
    """What is computed with; contents that are integer arrays are taken as they are."""
    engine: Engine = map
    """How functions reach the parts: `map`, here and in turn, or `engines.over_ray`."""
    sizes: Sequence[int] | None = None
    """Documents of each part where that is known; else they are counted when that is needed."""

    def __post_init__(self) -> None:
        count = len(self.parts)  # which an iterator of them has not
        if self.sizes is not None and len(self.sizes) != count:
            raise ValueError(f"got {count} parts, and sizes of {len(self.sizes)}")
        if any(iter(part) is part for part in self.parts):
            raise ValueError("documents are read several times; got an iterator, which ends once")

    def map(
        self, function: Callable[[Iterator[tuple[np.ndarray, str]]], Result]
    ) -> Iterable[Result]:
        """The function of the terms and languages of each part, in order."""
        return self.engine(partial(_read, function, self.terms), self.parts)

    def sample(self, size: int, random_seed: int = 0) -> list[Integer[np.ndarray, " tokens"]]:
        """Terms of `size` documents drawn without replacement, of all if there are fewer, in order
        and without those that are empty. Decided by the numbers of the documents, so that engine
        and division into parts do not matter."""
        ends = np.cumsum([0, *self._sizes()])
        if ends[-1] <= size:
            drawn = np.arange(ends[-1])
        else:
            rng = np.random.default_rng(random_seed)
            drawn = np.sort(rng.choice(ends[-1], size, replace=False))
        bounds = np.searchsorted(drawn, ends)
        numbers = [drawn[a:b] - start for a, b, start in zip(bounds, bounds[1:], ends)]
        asked = [number for number, wanted in enumerate(numbers) if len(wanted)]
        taken = self.engine(
            partial(_take, self.terms),
            [self.parts[number] for number in asked],
            [numbers[number] for number in asked],
        )
        return [ids for part in taken for ids in part if len(ids)]

    def _sizes(self) -> Sequence[int]:
        if self.sizes is not None:
            return self.sizes
        unknown = [part for part in self.parts if not isinstance(part, Sized)]
        counted = iter(self.engine(_count, unknown))
        return [len(p) if isinstance(p, Sized) else next(counted) for p in self.parts]


def _read(function: Callable[[Iterator], Result], terms: Terms, part: Part) -> Result:
    contents, languages = tee(part)
    ids = terms(content for content, _ in contents)
    return function(zip(ids, (language for _, language in languages)))


def _count(part: Part) -> int:
    return sum(1 for _ in part)


def _take(terms: Terms, part: Part, numbers: np.ndarray) -> list[np.ndarray]:
    """Terms of the documents of these numbers, ascending."""
    found = list(terms(_contents(part, numbers)))
    if len(found) < len(numbers):
        raise UserError(f"{part} has fewer documents than were counted before: it has changed")
    return found


def _contents(part: Part, numbers: np.ndarray) -> Iterator[Any]:
    documents = iter(part)
    for gap in np.diff(numbers, prepend=-1).tolist():
        yield from (content for content, _ in islice(documents, gap - 1, gap))
