"""Documents in parts, and a random sample of them that does not depend on where parts are read.

How functions reach the parts is `engines`; what is computed is `tfidf`.
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
"""Content and language of each document; a part can be iterated more than once. A part that goes to
another machine is pickled, so it should have the location of its documents, not their content."""
Terms = Callable[[Iterable[Any]], Iterable[np.ndarray]]
"""Function from contents of documents to an integer array [tokens] of each."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Documents:
    """All documents of several parts, in the order of the parts."""

    parts: Sequence[Part]
    terms: Terms = iter
    """Turns contents into terms; the default takes contents that are integer arrays already."""
    engine: Engine = map
    """How functions reach the parts: `map`, in this process and in order, or `over_ray`."""
    sizes: Sequence[int] | None = None
    """Number of documents of each part; None counts them when they are needed."""

    def __post_init__(self) -> None:
        count = len(self.parts)  # refuses an iterator of parts
        sizes = count if self.sizes is None else len(self.sizes)
        if sizes != count:
            raise ValueError(f"there must be a size for each of {count} parts; got {sizes}")
        if any(iter(part) is part for part in self.parts):
            raise ValueError("each part is read several times; got an iterator")

    def map(
        self, function: Callable[[Iterator[tuple[np.ndarray, str]]], Result]
    ) -> Iterable[Result]:
        """Results of a function of the terms and languages of each part, in order."""
        return self.engine(partial(_read, function, self.terms), self.parts)

    def sample(self, size: int, random_seed: int = 0) -> list[Integer[np.ndarray, " tokens"]]:
        """Terms of `size` documents drawn without replacement, in order, without empty ones; of all
        documents if there are fewer.

        The draw depends on the numbers of the documents alone, so the engine and the division into
        parts do not matter."""
        ends = np.cumsum([0, *self._sizes()])
        if ends[-1] <= size:
            drawn = np.arange(ends[-1])
        else:
            rng = np.random.default_rng(random_seed)
            drawn = np.sort(rng.choice(ends[-1], size, replace=False))
        bounds = np.searchsorted(drawn, ends)
        numbers = [drawn[a:b] - start for a, b, start in zip(bounds, bounds[1:], ends)]
        needed = [(part, drawn) for part, drawn in zip(self.parts, numbers) if len(drawn)]
        parts, drawn = [part for part, _ in needed], [drawn for _, drawn in needed]
        taken = self.engine(partial(_take, self.terms), parts, drawn)
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
    """Terms of the documents with these numbers, which ascend."""
    found = list(terms(_contents(part, numbers)))
    if len(found) < len(numbers):
        raise UserError(f"{part} has changed: it has fewer documents than were counted before")
    return found


def _contents(part: Part, numbers: np.ndarray) -> Iterator[Any]:
    documents = iter(part)
    for gap in np.diff(numbers, prepend=-1).tolist():
        yield from (content for content, _ in islice(documents, gap - 1, gap))
