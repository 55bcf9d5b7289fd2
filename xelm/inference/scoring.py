"""Log probability of every token of many documents under one model, in a few compiled batches.

Documents are cut into windows of at most T read tokens, which overlap or not, and packed into rows,
where they do not see each other.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from clustering.errors import UserError
from xelm.data.text_format import TextFormat
from xelm.models.config import ModelConfig
from xelm.models.head import target_log_probabilities
from xelm.models.parameters import bind, inference_graph

ROWS_A_BATCH, ROW_TOKENS = 16, 512
"""Rows that are read at once, and tokens of each. Rows for longer windows are fewer."""
LEAST_ROW_TOKENS = 16
"""Smallest number of tokens of a row."""
APART = 8
"""Distance in tokens from one masked token to the next, for encoders: about the share of masked
tokens that they are trained with."""


def targets(
    model: ModelConfig, ids: Integer[np.ndarray, " n"], text_format: TextFormat
) -> np.ndarray:
    """The tokens of a document that are predicted: its ids and, by a decoder, its end."""
    return np.append(ids, text_format.end_id) if model.causal else np.asarray(ids)


def unpredicted(model: ModelConfig, text_format: TextFormat) -> int:
    """Number of the first `targets` of a document that are not predicted: 1 where no token stands
    before the text, so that its own first token is given. Scores have 0 for it."""
    return int(model.causal and text_format.start_id is None)


def check_ids(ids: Integer[np.ndarray, " _"], model: ModelConfig) -> None:
    """Raises UserError for ids without a row of the embedding, as some special tokens are."""
    if len(ids) and ids.max() >= model.vocabulary_size:
        raise UserError(
            f"the text has a special token, {ids.max()}, for which this model of "
            f"{model.vocabulary_size} ids has no embedding"
        )


def check_windows(model: ModelConfig, context_length: int, stride: int | None) -> None:
    """Raises UserError for windows that a model cannot read, or that leave tokens out."""
    if not 1 <= context_length <= model.max_length:
        raise UserError(
            f"context_length must be between 1 and the {model.max_length} tokens that this model "
            f"can read; got {context_length}"
        )
    if stride is not None and not 1 <= stride <= context_length:
        raise UserError(
            f"stride must be between 1 and context_length, {context_length}; got {stride}"
        )


def score_documents(
    model: ModelConfig,
    parameters: Any,
    documents: Sequence[Integer[np.ndarray, " _"]],
    *,
    text_format: TextFormat,
    context_length: int,
    stride: int | None = None,
    dtype: str = "float32",
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[Float[np.ndarray, " _"]]:
    """Log probabilities, in nats, of the `targets` of each document; parameters `for_inference`.

    A decoder predicts each token from those before. An encoder predicts each from all others, as in
    pseudo-perplexity (Salazar et al. 2020, arXiv 1910.14659), except that every `APART`-th token is
    masked at once: `APART` forward passes instead of one for each token.

    context_length: tokens that the model reads at once. A longer document is read in windows of so
    many, each `stride` tokens after the one before; each token is predicted once, after the first
    window from at least context_length - stride tokens. stride: None is context_length, so that
    windows share no more than a token. text_format: special tokens around each document.
    progress: called with numbers of tokens that were scored.
    """
    return _measured(
        target_log_probabilities,
        model,
        parameters,
        documents,
        text_format=text_format,
        context_length=context_length,
        stride=stride,
        dtype=dtype,
        progress=progress,
    )


def states_of_documents(
    model: ModelConfig,
    parameters: Any,
    documents: Sequence[Integer[np.ndarray, " _"]],
    **options: Any,
) -> list[Float[np.ndarray, "_ D"]]:
    """The states from which each of the `targets` is predicted, float32, as `score_documents` reads
    them and with its options."""
    return _measured(_states, model, parameters, documents, **options)


def _states(states, head, targets):
    return states.astype(jnp.float32)


def _measured(
    measure: Callable[..., Any],
    model: ModelConfig,
    parameters: Any,
    documents: Sequence[Integer[np.ndarray, " _"]],
    *,
    text_format: TextFormat,
    context_length: int,
    stride: int | None = None,
    dtype: str = "float32",
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[np.ndarray]:
    """Results of `measure`, a function of (states, head, targets), for each document's targets."""
    start, mask_id = text_format.start_ids, text_format.mask_id
    framed = [text_format.framed(ids) for ids in documents]
    value = () if measure is target_log_probabilities else (model.width,)
    scores = [
        np.zeros((len(targets(model, i, text_format)), *value), np.float32) for i in documents
    ]
    lengths = [len(document) for document in framed]
    # A decoder does not read the last token of a window; an encoder's first is context only.
    longest = context_length + model.causal
    step = min(stride or context_length, longest - 1)
    score = (_scorer if model.causal else _masked_scorer)(model, dtype, measure)
    # An encoder's windows begin at a multiple of APART, where hidden tokens lie alike.
    unit = 1 if model.causal else APART
    for size, rows in _pack(windows(lengths, longest, step), longest, unit):
        count = max(1, min(ROWS_A_BATCH, ROWS_A_BATCH * ROW_TOKENS // size))
        for first in range(0, len(rows), count):
            part = rows[first : first + count]
            shape = (count, size)
            tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
            predicted = np.zeros(shape, bool)
            for r, row in enumerate(part):
                for s, (window, column) in enumerate(row, 1):
                    where = slice(column, column + window.size)
                    tokens[r, where] = framed[window.document][window.begin : window.end]
                    segments[r, where] = s
                    positions[r, where] = np.arange(window.size)
                    # Not what another window predicts, nor an encoder's end.
                    last = min(window.end, len(start) + len(scores[window.document]))
                    at = column - window.begin
                    predicted[r, at + window.known : at + last] = 1
            found = np.asarray(score(parameters, tokens, segments, positions, predicted, mask_id))
            for r, row in enumerate(part):
                for window, column in row:
                    own = scores[window.document]
                    last = min(window.end, len(start) + len(own))
                    # Without the first column: what is found at a column is of the next one.
                    at = column - window.begin - 1
                    new = found[r, at + window.known : at + last]
                    own[window.known - len(start) : last - len(start)] = new
            progress(sum(window.end - window.known for row in part for window, _ in row))
    return scores


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `begin` to `end` of a document, of which those from `known` on are predicted here."""

    document: int
    begin: int
    end: int
    known: int

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.end - self.begin


def windows(lengths: Sequence[int], longest: int, step: int) -> list[Window]:
    """Windows in which each token but the first of each document is predicted once. lengths: tokens
    of each document. longest: tokens of a window, of which a decoder does not read the last. step:
    tokens from the beginning of one window to that of the next."""
    found = []
    for document, length in enumerate(lengths):
        begin, known = 0, 1
        while known < length:
            end = min(begin + longest, length)
            found.append(Window(document, begin, end, known))
            begin, known = begin + step, end
    return found


@functools.lru_cache(maxsize=8)
def _scorer(model: ModelConfig, dtype: str, measure: Callable[..., Any]):
    shape = inference_graph(model, dtype)

    @jax.jit
    def score(parameters, tokens, segments, positions, predicted, _):
        network = bind(shape, parameters)
        hidden = network.hidden(
            tokens[:, :-1],
            positions=positions[:, :-1],
            segments=segments[:, :-1],
        )
        states, head = network.output(hidden)
        return measure(states, head, tokens[:, 1:])

    return score


@functools.lru_cache(maxsize=8)
def _masked_scorer(model: ModelConfig, dtype: str, measure: Callable[..., Any]):
    """The same as `_scorer`, for encoders."""
    shape = inference_graph(model, dtype)

    @jax.jit
    def score(parameters, tokens, segments, positions, predicted, mask_id):
        network = bind(shape, parameters)

        def predict(phase):
            masked = predicted & (jnp.arange(tokens.shape[1]) % APART == phase)[None]
            given = jnp.where(masked, mask_id, tokens)
            hidden = network.hidden(given, positions=positions, segments=segments)
            # Every APART-th column alone passes the head.
            states, head = network.output(hidden.reshape(-1, APART, model.width)[:, phase])
            return measure(states, head, tokens.reshape(-1, APART)[:, phase])

        found = jnp.moveaxis(jax.lax.map(predict, jnp.arange(APART)), 0, 1)
        return found.reshape(*tokens.shape, *found.shape[2:])[:, 1:]

    return score


def _pack(
    windows: Sequence[Window], longest: int, unit: int
) -> list[tuple[int, list[list[tuple[Window, int]]]]]:
    """Rows of windows, each with its first column, grouped by the columns of a row. There are few
    sizes, and none is twice as long as its windows unless several share it."""
    sizes = _sizes(max((window.size for window in windows), default=0), longest, unit)
    by_size: dict[int, list[Window]] = {}
    for window in windows:
        by_size.setdefault(next(s for s in sizes if s >= window.size), []).append(window)
    return [(size, _rows(some, size, unit)) for size, some in sorted(by_size.items())]


def _sizes(needed: int, longest: int, unit: int) -> list[int]:
    """Possible numbers of columns of a row: one for all short windows, and powers of two for longer
    ones, up to the longest of all."""
    more = unit == 1  # a column of targets that is not read
    read = LEAST_ROW_TOKENS
    while read < min(needed - more, ROW_TOKENS):
        read *= 2
    sizes = [read + more]
    while sizes[-1] < needed:
        read *= 2
        sizes.append(read + more)
    sizes[-1] = max(min(sizes[-1], longest), needed)
    return [-(-size // unit) * unit if unit > 1 else size for size in sizes]


def _rows(windows: Sequence[Window], size: int, unit: int) -> list[list[tuple[Window, int]]]:
    """Windows packed into rows of `size` columns, the longest first into the fullest row that has
    space, at multiples of `unit`."""
    rows: list[list[tuple[Window, int]]] = []
    open_rows: dict[int, list[int]] = {}  # free columns -> rows
    for window in sorted(windows, key=lambda window: -window.size):
        length = -(-window.size // unit) * unit
        free = min((f for f in open_rows if f >= length and open_rows[f]), default=None)
        if free is None:
            rows.append([])
            row, free = len(rows) - 1, size
        else:
            row = open_rows[free].pop()
        rows[row].append((window, size - free))
        open_rows.setdefault(free - length, []).append(row)
    return rows
