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

from clustering.errors import UserError
from xelm.models.config import ModelConfig
from xelm.models.parameters import bind_layers, graph
from xelm.training.loss import target_log_probabilities

ROWS_A_BATCH = 16
# Tokens from one hidden one to the next, where an encoder is asked: about the share of hidden
# tokens that encoders are trained with.
APART = 8


def targets(model: ModelConfig, ids: Integer[np.ndarray, " n"], end_id: int) -> np.ndarray:
    """What a model is asked to predict of a document: its ids, and by a decoder its end."""
    return np.append(ids, end_id) if model.causal else np.asarray(ids)


def check_ids(ids: Integer[np.ndarray, " _"], model: ModelConfig) -> None:
    """Refuses ids without a row of the embedding: the special tokens of some tokenizers."""
    if len(ids) and ids.max() >= model.vocabulary_size:
        raise UserError(
            f"the text has a special token, {ids.max()}, for which this model of "
            f"{model.vocabulary_size} ids has no embedding"
        )


def score_documents(
    model: ModelConfig,
    parameters: Any,
    documents: Sequence[Integer[np.ndarray, " _"]],
    *,
    start_id: int,
    end_id: int,
    sequence_length: int,
    mask_id: int | None = None,
    dtype: str = "float32",
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[Float[np.ndarray, " _"]]:
    """Log probabilities, in nats, of the `targets` of each document; parameters `for_inference`.

    A decoder predicts each from those before. An encoder predicts each from all others, as in
    pseudo-perplexity (Salazar et al. 2020, arXiv 1910.14659), save that every `APART`-th token is
    hidden at once: `APART` readings instead of one for each token. A document longer than
    `sequence_length` is read in windows that do not see each other.
    """
    return _measured(
        target_log_probabilities,
        model,
        parameters,
        documents,
        start_id=start_id,
        end_id=end_id,
        sequence_length=sequence_length,
        mask_id=mask_id,
        dtype=dtype,
        progress=progress,
    )


def states_of_documents(
    model: ModelConfig,
    parameters: Any,
    documents: Sequence[Integer[np.ndarray, " _"]],
    **options: Any,
) -> list[Float[np.ndarray, "_ D"]]:
    """What the output head reads where each of the `targets` is predicted; as `score_documents`,
    with its options."""
    return _measured(_states, model, parameters, documents, **options)


def _states(states, head, targets):
    return states.astype(jnp.float32)


def _measured(
    measure: Callable[..., Any],
    model: ModelConfig,
    parameters: Any,
    documents: Sequence[Integer[np.ndarray, " _"]],
    *,
    start_id: int,
    end_id: int,
    sequence_length: int,
    mask_id: int | None,
    dtype: str = "float32",
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[np.ndarray]:
    """What `measure` finds of (states, head, targets), by target of each document."""
    framed = [np.concatenate([[start_id], ids, [end_id]]) for ids in documents]
    value = () if measure is target_log_probabilities else (model.width,)
    scores = [np.empty((len(targets(model, i, end_id)), *value), np.float32) for i in documents]
    lengths = [len(document) for document in framed]
    if model.causal:
        size = sequence_length + 1  # the last token of a row is not read
        rows = _pack(lengths, size, size)
    else:  # every window begins at a multiple of APART, where hidden tokens lie alike
        size = -(-sequence_length // APART) * APART
        rows = _pack(lengths, sequence_length, size, APART)
    score = (_scorer if model.causal else _guesser)(model, dtype, measure)
    for first in range(0, len(rows), ROWS_A_BATCH):
        part = rows[first : first + ROWS_A_BATCH]
        shape = (ROWS_A_BATCH, size)
        tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
        asked = np.zeros(shape, bool)
        for r, row in enumerate(part):
            for s, (number, begin, end, column) in enumerate(row, 1):
                where = slice(column, column + end - begin)
                tokens[r, where] = framed[number][begin:end]
                segments[r, where] = s
                positions[r, where] = np.arange(end - begin)
                # A window's first token is context only; so is, for an encoder, a document's end.
                last = min(end - 1, len(scores[number]))
                asked[r, column + 1 : column + 1 + last - begin] = True
        found = np.asarray(score(parameters, tokens, segments, positions, asked, mask_id))
        for r, row in enumerate(part):
            for number, begin, end, column in row:
                # Without the first column: what is found at a column is of the next one.
                last = min(end - 1, len(scores[number]))
                scores[number][begin:last] = found[r, column : column + last - begin]
        progress(sum(end - begin - 1 for row in part for _, begin, end, _ in row))
    return scores


@functools.lru_cache(maxsize=8)
def _scorer(model: ModelConfig, dtype: str, measure: Callable[..., Any]):
    shape = graph(model, dtype, turned=True)

    @jax.jit
    def score(parameters, tokens, segments, positions, asked, _):
        network, layers = bind_layers(shape, parameters)
        hidden = network.hidden(
            tokens[:, :-1],
            positions=positions[:, :-1],
            segments=segments[:, :-1],
            layers=layers,
        )
        states, head = network.output(hidden)
        return measure(states, head, tokens[:, 1:])

    return score


@functools.lru_cache(maxsize=8)
def _guesser(model: ModelConfig, dtype: str, measure: Callable[..., Any]):
    """As `_scorer`, of a model that sees both sides."""
    shape = graph(model, dtype, turned=True)

    @jax.jit
    def score(parameters, tokens, segments, positions, asked, mask_id):
        network, layers = bind_layers(shape, parameters)

        def guess(phase):
            hidden_now = asked & (jnp.arange(tokens.shape[1]) % APART == phase)[None]
            given = jnp.where(hidden_now, mask_id, tokens)
            hidden = network.hidden(given, positions=positions, segments=segments, layers=layers)
            # Every APART-th column alone passes the head.
            states, head = network.output(hidden.reshape(-1, APART, model.width)[:, phase])
            return measure(states, head, tokens.reshape(-1, APART)[:, phase])

        found = jnp.moveaxis(jax.lax.map(guess, jnp.arange(APART)), 0, 1)
        return found.reshape(*tokens.shape, *found.shape[2:])[:, 1:]

    return score


def _pack(
    lengths: Sequence[int], longest: int, size: int, unit: int = 1
) -> list[list[tuple[int, int, int, int]]]:
    """Rows of `size` columns with windows (document, begin, end, column) of at most `longest`
    tokens, longest window first into the first row with room, at multiples of `unit`. Windows
    overlap by the one token that is context only."""
    windows = []
    for number, length in enumerate(lengths):
        begin = 0
        while begin < length - 1:
            end = min(begin + longest, length)
            windows.append((end - begin, number, begin, end))
            begin = end - 1
    windows.sort(key=lambda window: -window[0])
    rows: list[list[tuple[int, int, int, int]]] = []
    open_rows: dict[int, list[int]] = {}  # free columns -> rows
    for length, number, begin, end in windows:
        length = -(-length // unit) * unit
        free = min((f for f in open_rows if f >= length and open_rows[f]), default=None)
        if free is None:
            rows.append([])
            row, free = len(rows) - 1, size
        else:
            row = open_rows[free].pop()
        rows[row].append((number, begin, end, size - free))
        open_rows.setdefault(free - length, []).append(row)
    return rows
