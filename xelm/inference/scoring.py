"""log p of every token of many documents under one model, in a few compiled batches.

Documents are cut into windows of at most T predicted tokens and packed into rows, where they do
not see each other.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from xelm.models.checkpoint import bind, graph
from xelm.models.config import ModelConfig
from xelm.training.loss import target_log_probabilities
from xelm.training.step import target_weights

ROWS_A_BATCH = 16


def score_documents(
    model: ModelConfig,
    parameters: Any,
    documents: Sequence[Integer[np.ndarray, " _"]],
    *,
    start_id: int,
    end_id: int,
    sequence_length: int,
    dtype: str = "float32",
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[Float[np.ndarray, " _"]]:
    """Log probabilities, in nats, of each document's tokens and of its end: n + 1 for n ids.

    A document longer than `sequence_length` is read in windows that do not see each other.
    """
    framed = [np.concatenate([[start_id], ids, [end_id]]) for ids in documents]
    scores = [np.empty(len(document) - 1, np.float32) for document in framed]
    rows = _pack([len(document) for document in framed], sequence_length + 1)
    score = _scorer(model, dtype)
    for first in range(0, len(rows), ROWS_A_BATCH):
        part = rows[first : first + ROWS_A_BATCH]
        shape = (ROWS_A_BATCH, sequence_length + 1)
        tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
        for r, row in enumerate(part):
            for s, (number, begin, end, column) in enumerate(row, 1):
                where = slice(column, column + end - begin)
                tokens[r, where] = framed[number][begin:end]
                segments[r, where] = s
                positions[r, where] = np.arange(end - begin)
        found = np.asarray(score(parameters, tokens, segments, positions))
        for r, row in enumerate(part):
            for number, begin, end, column in row:
                scores[number][begin : end - 1] = found[r, column : column + end - begin - 1]
        progress(sum(end - begin - 1 for row in part for _, begin, end, _ in row))
    return scores


@functools.lru_cache(maxsize=8)
def _scorer(model: ModelConfig, dtype: str):
    decoder = graph(model, dtype)

    @jax.jit
    def score(parameters, tokens, segments, positions):
        network = bind(decoder, parameters)
        hidden = network.hidden(
            tokens[:, :-1], positions=positions[:, :-1], segments=segments[:, :-1]
        )
        found = target_log_probabilities(
            hidden.reshape(-1, model.width), network.output_head(), tokens[:, 1:].reshape(-1)
        ).reshape(tokens.shape[0], -1)
        return jnp.where(target_weights(segments), found, 0.0)

    return score


def _pack(lengths: Sequence[int], size: int) -> list[list[tuple[int, int, int, int]]]:
    """Rows of windows (document, begin, end, column), longest window first into the first row
    with room. Windows overlap by the one token that is context only."""
    windows = []
    for number, length in enumerate(lengths):
        begin = 0
        while begin < length - 1:
            end = min(begin + size, length)
            windows.append((end - begin, number, begin, end))
            begin = end - 1
    windows.sort(key=lambda window: -window[0])
    rows: list[list[tuple[int, int, int, int]]] = []
    open_rows: dict[int, list[int]] = {}  # free columns -> rows
    for length, number, begin, end in windows:
        free = min((f for f in open_rows if f >= length and open_rows[f]), default=None)
        if free is None:
            rows.append([])
            row, free = len(rows) - 1, size
        else:
            row = open_rows[free].pop()
        rows[row].append((number, begin, end, size - free))
        open_rows.setdefault(free - length, []).append(row)
    return rows
