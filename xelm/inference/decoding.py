"""One model that reads growing texts with a cache and gives what may come next."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from xelm.models.config import ModelConfig
from xelm.models.parameters import bind, graph
from xelm.models.transformer import empty_cache
from xelm.training.loss import target_log_probabilities


class Reader:
    """Reads a batch of texts in order, as many ids at a time as they come. What is read at once is
    padded on the left, to a power of two: few compiled shapes."""

    def __init__(self, model: ModelConfig, parameters: Any, rows: int, slots: int):
        """slots: room for all that will be read, padding included."""
        self.parameters = parameters
        self.logits: Float[Array, "B V"] = jnp.full((rows, model.vocabulary_size), jnp.nan)
        """Scores over the vocabulary after all that was read of each text; nan before that."""
        self._extend = _extender(model)
        self._cache = empty_cache(model, rows, slots, jnp.float32)

    def read(
        self, texts: Sequence[Int[np.ndarray, " _"]], *, scored: bool = False
    ) -> list[Float[np.ndarray, " _"]]:
        """Reads more ids of each text. If `scored`, returns the log probability of each (nan for
        the very first of a text); otherwise nothing."""
        size = padded(max((len(ids) for ids in texts), default=0))
        if not size:
            return [np.zeros(0) for _ in texts if scored]
        tokens = np.zeros((len(texts), size), np.int32)
        valid = np.zeros(tokens.shape, bool)
        for row, ids in enumerate(texts):
            tokens[row, size - len(ids) :] = ids
            valid[row, size - len(ids) :] = True
        found, self.logits, self._cache = self._extend(
            self.parameters, tokens, valid, self._cache, self.logits, scored=scored
        )
        if not scored:
            return []
        return [row[size - len(ids) :] for row, ids in zip(np.asarray(found), texts)]


def padded(length: int) -> int:
    """Columns that so many ids take."""
    return 1 << (length - 1).bit_length() if length else 0


@functools.lru_cache(maxsize=8)
def _extender(model: ModelConfig):
    shape = graph(model)

    @functools.partial(jax.jit, donate_argnums=(3, 4), static_argnames="scored")
    def extend(parameters, tokens, valid, cache, logits, *, scored):
        network = bind(shape, parameters)
        hidden, cache = network.extend(tokens, cache, valid=valid)
        following = jnp.where(valid[:, -1:], network.logits(hidden[:, -1]), logits)
        if not scored:
            return jnp.zeros((len(tokens), 0)), following, cache
        # The first of each text follows what was read before, whatever stands left of it here.
        before = jnp.take_along_axis(jax.nn.log_softmax(logits), _first(tokens, valid), axis=-1)
        if tokens.shape[1] == 1:
            return before, following, cache
        states, head = network.output(hidden[:, :-1])
        inner = target_log_probabilities(states, head, tokens[:, 1:])
        starts = valid & ~jnp.pad(valid[:, :-1], [(0, 0), (1, 0)])
        found = jnp.pad(inner, [(0, 0), (1, 0)])
        return jnp.where(starts, before, found), following, cache

    return extend


def _first(tokens, valid):
    """The first valid token of each row."""
    return jnp.take_along_axis(tokens, valid.argmax(axis=1)[:, None], axis=1)
