"""Scoring in pieces: a decoder reads the windows of long texts a few tokens at a time, with a cache
of keys and values, so that sequences that are being generated never wait for all of a window."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from xelm.data.text_format import TextFormat
from xelm.inference.blocks import row_bytes, slots_for
from xelm.inference.decoder import GROWTH, PIECES, piece_size, reading_cost, tokens_within
from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.scoring import Measure, score_documents, target_log_probabilities, windows
from xelm.inference.work import Allowance, Work
from xelm.models.cache import Cache, empty_cache, longer_cache
from xelm.models.config import ModelConfig
from xelm.models.parameters import compiled_by_model

_LEAST_AT_ONCE = PIECES[0]
"""Number of tokens up to which a text is read at once, whatever is left of the allowance."""


@dataclass(eq=False)
class PiecewiseScorer:
    """Scores documents as `scoring.at_once` does, with the same values, in pieces within an
    allowance of tokens. For decoders."""

    memory: ParameterCache | None = None
    """In whose account the caches are; None: memory is not limited."""
    allowance: Allowance = field(default_factory=Allowance)
    """How many tokens may be read now."""
    bytes: int = 0
    """Size of its caches."""
    tokens_read: int = 0
    """Number of tokens that were read so far."""

    def drop_kept(self) -> None:
        """Frees caches of texts that nobody reads: there are none."""

    def __call__(
        self,
        model: ModelConfig,
        parameters: Callable[[], Any],
        documents: Sequence[Integer[np.ndarray, " _"]],
        *,
        text_format: TextFormat,
        context_length: int,
        stride: int | None = None,
        dtype: str = "float32",
        measure: Measure = target_log_probabilities,
    ) -> Work[list[Float[np.ndarray, "_ ..."]]]:
        """As `score_documents`. parameters: called before each piece is read, so that the
        parameters of other models may take their place in memory between two pieces."""
        options: dict[str, Any] = {"dtype": dtype, "measure": measure}
        cuts = {"text_format": text_format, "context_length": context_length, "stride": stride}
        found: list[Any] = []
        while len(found) < len(documents):
            yield from self.allowance.wait()
            # Several short documents are packed into few rows.
            some, tokens = [], 0
            for ids in documents[len(found) :]:
                tokens += len(ids)
                if tokens > max(self.allowance.left, _LEAST_AT_ONCE):
                    break
                some.append(ids)
            if some:
                read = sum(map(len, some))
                self.tokens_read += read
                self.allowance.left -= read
                found += score_documents(model, parameters(), some, **options, **cuts)
                continue
            framed = text_format.framed(documents[len(found)])
            longest = context_length + 1
            step = min(stride or context_length, longest - 1)
            parts = []
            for window in windows([len(framed)], longest, step):
                ids = framed[window.begin : window.end]
                measured = yield from self._read_window(model, parameters, ids, **options)
                parts.append(measured[window.known - window.begin - 1 :])
            # The first token of a document is not predicted where no other stands before it.
            own = np.concatenate(parts)
            first = 1 - len(text_format.start_ids)
            found.append(np.pad(own, [(first, 0), *[(0, 0)] * (own.ndim - 1)]))
        return found

    def _read_window(
        self,
        model: ModelConfig,
        parameters: Callable[[], Any],
        ids: Integer[np.ndarray, " _"],
        *,
        dtype: str,
        measure: Measure,
    ) -> Work[Float[np.ndarray, "_ ..."]]:
        """What is measured of each of these ids but the first, each read after those before it."""
        read, found, last = 0, [], len(ids) - 1
        extend = _extender(model, dtype)
        slots, cache = 0, Cache((), (), jnp.zeros(1, jnp.int32))
        try:
            while read < last:
                yield from self.allowance.wait()
                cost = reading_cost(model, read)
                count = tokens_within(self.allowance.left / cost, last - read)
                size = piece_size(read, count)
                count = min(count, size)
                needed = slots_for(read + count)
                if slots < needed:
                    more = max(needed, min(slots_for(last), GROWTH * slots))
                    yield from self._reserve(
                        model, row_bytes(model, more, dtype) - row_bytes(model, slots, dtype), dtype
                    )
                    cache = (
                        longer_cache(model, cache, more)
                        if slots
                        else empty_cache(model, 1, more, dtype)
                    )
                    slots = more
                tokens, targets = (np.zeros((1, size), np.int32) for _ in range(2))
                tokens[0, :count] = ids[read : read + count]
                targets[0, :count] = ids[read + 1 : read + count + 1]
                counts = np.asarray([count], np.int32)
                measured, cache = extend(
                    parameters(), tokens, targets, counts, cache, measure=measure
                )
                found.append(np.asarray(measured)[0, :count])
                read += count
                self.tokens_read += count
                self.allowance.left -= count * cost
            return np.concatenate(found)
        finally:
            self._free()

    def _reserve(self, model: ModelConfig, more: int, dtype: str) -> Work[None]:
        """Accounts for so many further bytes; pauses while there is no memory for them."""
        beside = model.parameter_count * jnp.dtype(dtype).itemsize
        while self.memory is not None and not self.memory.reserve(self, more, beside):
            self.allowance.lacks_memory = True
            yield
        self.bytes += more

    def _free(self) -> None:
        if self.memory is not None:
            self.memory.reserve(self, -self.bytes, 0)
        self.bytes = 0


@compiled_by_model(donate_argnums=4, static_argnames="measure")
def _extender(network, tokens, targets, counts, cache, *, measure):
    """What is measured at new tokens after those in a cache, and the longer cache."""
    hidden, longer = network.extend(tokens, counts, cache)
    states, head = network.output(hidden)
    return measure(states, head, targets), longer
