"""One model that reads a growing text with a cache and gives the next token's distribution."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from xelm.models.checkpoint import bind, graph
from xelm.models.config import ModelConfig
from xelm.models.decoder import empty_cache
from xelm.training.loss import target_log_probabilities


class Reader:
    """Reads ids in order, as many at a time as they come."""

    def __init__(self, model: ModelConfig, parameters: Any, slots: int, dtype: str = "float32"):
        """slots: the longest text, in tokens, that will be read."""
        self.parameters = parameters
        self.read_count = 0
        self.following = np.full(model.vocabulary_size, np.nan)
        """Log probabilities over the vocabulary after all that was read, [V]; nan before that."""
        self._extend = _extender(model, dtype)
        self._cache = empty_cache(model, 1, slots, jnp.dtype(dtype))

    def read(
        self, ids: Int[np.ndarray, " n"], *, scored: bool = False
    ) -> Float[np.ndarray, " n"] | None:
        """Reads more ids; if `scored`, returns the log probability of each (nan for the very first
        of a text). Pieces are powers of two long: texts of any length need few compiled shapes."""
        ids, scores = np.asarray(ids, np.int32), []
        while len(ids):
            size = 1 << (len(ids).bit_length() - 1)
            piece, ids = ids[:size], ids[size:]
            first = self.following[piece[0]]
            inner, following, self._cache = self._extend(
                self.parameters, piece[None], self._cache, scored=scored
            )
            self.following = np.asarray(following, np.float64)
            self.read_count += size
            if scored:
                scores += [[first], np.asarray(inner)]
        return np.concatenate(scores) if scored else None


@functools.lru_cache(maxsize=8)
def _extender(model: ModelConfig, dtype: str):
    decoder = graph(model, dtype)

    @functools.partial(jax.jit, donate_argnums=2, static_argnames="scored")
    def extend(parameters, tokens, cache, *, scored):
        network = bind(decoder, parameters)
        hidden, cache = network.extend(tokens, cache, valid=jnp.ones(tokens.shape, bool))
        following = jax.nn.log_softmax(network.logits(hidden[0, -1]))
        if not scored or tokens.shape[1] == 1:
            return jnp.zeros((0,)), following, cache
        head = network.output_head()
        inner = target_log_probabilities(hidden[0, :-1], head, tokens[0, 1:])
        return inner, following, cache

    return extend
