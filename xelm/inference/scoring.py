"""Log probability of every token of many documents under one model, in a few compiled batches.
Documents are cut into windows, which are packed into rows and do not see each other there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from clustering.errors import UserError
from xelm.data.text_format import TextFormat
from xelm.data.vocabulary import Vocabulary
from xelm.inference.pool import OwnVocabulary, Pool
from xelm.inference.route import Decision, Walk
from xelm.inference.spelling import spell
from xelm.inference.work import Work
from xelm.models.config import ModelConfig
from xelm.models.head import Head, target_log_probabilities
from xelm.models.parameters import compiled_by_model

ROWS_A_BATCH, ROW_TOKENS = 16, 512
"""Rows that are read at once, and tokens of each. Rows for longer windows are fewer."""
FEW_ROWS = (1, 4)
"""Rows that are read at once where there are no more; few, as a program is compiled for each."""
LEAST_ROW_TOKENS = 16
"""Smallest number of tokens of a row."""
APART = 8
"""Distance from one masked token to the next: about the share that encoders are trained with."""

Measure = Callable[[Array, Head, Array], Array]
"""(states [*B, D], head, targets [*B]) -> what is measured at each target"""
Scorer = Callable[..., Work[list[Float[np.ndarray, "_ ..."]]]]
"""How documents are scored, `at_once` or by a `PiecewiseScorer`: a function with the arguments of
`score_documents`, but for the parameters, in whose place is a function that returns them."""


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


def score_documents(
    model: ModelConfig,
    parameters: Any,
    documents: Sequence[Integer[np.ndarray, " _"]],
    *,
    text_format: TextFormat,
    context_length: int,
    stride: int | None = None,
    dtype: str = "float32",
    measure: Measure = target_log_probabilities,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[Float[np.ndarray, "_ ..."]]:
    """Log probabilities, in nats, of the `targets` of each document; parameters `for_inference`.

    A decoder predicts each token from those before. An encoder predicts each from all others, as in
    pseudo-perplexity (Salazar et al. 2020, arXiv 1910.14659), except that every `APART`-th token is
    masked at once: `APART` forward passes instead of one for each token.

    context_length: tokens that the model reads at once. A longer document is read in windows of so
    many, each `stride` tokens after the one before; each token is predicted once, after the first
    window from at least context_length - stride tokens. stride: None is context_length.
    text_format: special tokens around each document. measure: what is measured of each target
    instead, such as `final_states`. progress: called with numbers of tokens that were scored."""
    start, mask_id = text_format.start_ids, text_format.mask_id
    framed = [text_format.framed(ids) for ids in documents]
    value = {final_states: (model.width,), states_and_scores: (model.width + 1,)}.get(measure, ())
    counts = [len(targets(model, ids, text_format)) for ids in documents]
    scores = [np.zeros((count, *value), np.float32) for count in counts]
    lengths = [len(document) for document in framed]
    # A decoder does not read the last token of a window; an encoder's first is context only.
    longest = context_length + model.causal
    step = min(stride or context_length, longest - 1)
    score = partial(_scorer(model, dtype), measure=measure)
    # An encoder's windows begin at a multiple of APART, where hidden tokens lie alike.
    unit = 1 if model.causal else APART
    for size, rows in _pack(windows(lengths, longest, step), longest, unit):
        count = max(1, min(ROWS_A_BATCH, ROWS_A_BATCH * ROW_TOKENS // size))
        count = next((few for few in FEW_ROWS if len(rows) <= few <= count), count)
        for first in range(0, len(rows), count):
            tokens, segments, positions = (np.zeros((count, size), np.int32) for _ in range(3))
            predicted = np.zeros((count, size), bool)
            places = []
            for r, row in enumerate(rows[first : first + count]):
                for segment, (window, column) in enumerate(row, 1):
                    where = slice(column, column + window.size)
                    tokens[r, where] = framed[window.document][window.begin : window.end]
                    segments[r, where], positions[r, where] = segment, np.arange(window.size)
                    # Not what another window predicts, nor an encoder's end.
                    last = min(window.end, len(start) + counts[window.document])
                    at = column - window.begin
                    predicted[r, at + window.known : at + last] = 1
                    places.append((r, at, window, last))
            found = np.asarray(score(parameters, tokens, segments, positions, predicted, mask_id))
            for r, at, window, last in places:
                # Without the first column: what is found at a column is of the next one.
                new = found[r, at + window.known - 1 : at + last - 1]
                scores[window.document][window.known - len(start) : last - len(start)] = new
            progress(sum(window.end - window.known for _, _, window, _ in places))
    return scores


def at_once(
    model: ModelConfig,
    parameters: Callable[[], Any],
    documents: Sequence[Integer[np.ndarray, " _"]],
    **options: Any,
) -> Work[list[Float[np.ndarray, "_ ..."]]]:
    """`score_documents` as a `Scorer`, which never pauses."""
    yield from ()
    return score_documents(model, parameters(), documents, **options)


def final_states(states, head, targets):
    """What `score_documents` can measure: the states from which targets are predicted, float32."""
    return states.astype(jnp.float32)


def states_and_scores(states, head, targets):
    """`final_states`, with the log probability of the target as one more column."""
    scores = target_log_probabilities(states, head, targets)[..., None]
    return jnp.concatenate([states.astype(jnp.float32), scores], axis=-1)


def checked(
    name: str, found: Sequence[Float[np.ndarray, "_ ..."]]
) -> Sequence[Float[np.ndarray, "_ ..."]]:
    """What was found of documents by the model with this name. UserError if some are no numbers,
    which a mixture would pass on, and which no file could hold."""
    for number, own in enumerate(found, 1):
        if np.isnan(own).any():
            raise UserError(f"{name}: no probabilities (NaN or infinity) in document {number}")
    return found


def decide_along(
    pool: Pool,
    walks: Sequence[Walk],
    documents: Sequence[Integer[np.ndarray, " _"]],
    reading: Mapping[str, Any],
    score: Scorer = at_once,
) -> Work[tuple[list[Decision], list[Float[np.ndarray, "M _"]], list[set[int]]]]:
    """Weights of the models along each document; the models' scores of its `targets`, as far as the
    router needed them; and the models that it needed. reading: options of `score_documents`."""
    scores = [np.zeros((len(pool.names), len(i) + pool.model.causal)) for i in documents]
    experts = range(pool.router.experts)
    needing = [walk.needs_log_likelihoods for walk in walks]
    read = [{*experts} - {*pool.own} if needed else set() for needed in needing]
    yield from score_models(pool, documents, scores, read, reading, score)
    compared = yield from in_own_vocabularies(pool, walks, documents, scores, reading, score)
    decisions = [
        walk.decide(found[: len(experts), : len(walk.states) - 1], pool.limits, len(pool.names))
        for walk, found in zip(walks, compared)
    ]
    return decisions, scores, read


def in_own_vocabularies(
    pool: Pool,
    walks: Sequence[Walk],
    documents: Sequence[Integer[np.ndarray, " _"]],
    scores: Sequence[Float[np.ndarray, "M _"]],
    reading: Mapping[str, Any],
    score: Scorer = at_once,
) -> Work[list[Float[np.ndarray, "M _"]]]:
    """What a router compares: the scores of each document, with those in their own vocabularies of
    the models that have others than the pool, for the documents of which the router needs them."""
    found = list(scores)
    for model, own in pool.own.items():
        numbers = [
            number
            for number, walk in enumerate(walks)
            if model < walk.router.experts and walk.needs_log_likelihoods
        ]
        some = [(documents[number], walks[number].known, walks[number].mask) for number in numbers]
        scored = yield from score_spelled(own, pool.vocabulary, some, reading, score)
        for number, one in zip(numbers, checked(pool.names[model], scored)):
            if found[number] is scores[number]:
                found[number] = scores[number].copy()
            found[number][model, : len(one)] = one
    return found


def score_spelled(
    own: OwnVocabulary,
    vocabulary: Vocabulary | None,
    texts: Sequence[tuple[Integer[np.ndarray, " _"], int, np.ndarray | None]],
    reading: Mapping[str, Any],
    score: Scorer = at_once,
) -> Work[list[Float[np.ndarray, " _"]]]:
    """Log probability, in nats, that a model gives to the tokens of each text in its own
    vocabulary. What a piece of several tokens has counts at the last of them.

    vocabulary: that of the texts. texts: ids, number of known ones and mask, as in `spell`.
    reading: options of `score_documents`."""
    if not texts:
        return []
    spellings = [spell(ids, vocabulary, own.vocabulary, known, mask) for ids, known, mask in texts]
    ids = [spelling.ids for spelling in spellings]
    found = yield from score(own.model, own.parameters, ids, **reading)
    sums = [np.zeros(len(ids)) for ids, _, _ in texts]
    for total, spelling, scores in zip(sums, spellings, found):
        np.add.at(total, spelling.places, scores[: len(spelling.places)])
    return sums


def score_models(
    pool: Pool,
    documents: Sequence[Integer[np.ndarray, " _"]],
    scores: Sequence[Float[np.ndarray, "M _"]],
    models: Sequence[set[int]],
    reading: Mapping[str, Any],
    score: Scorer = at_once,
) -> Work[None]:
    """Fills the rows of each document's `scores` for these models of it."""
    for model in range(len(pool.names)):
        chosen = [number for number, some in enumerate(models) if model in some]
        if chosen:
            some = [documents[number] for number in chosen]
            parameters = partial(pool.parameters.__getitem__, model)
            found = yield from score(pool.model, parameters, some, **reading)
            for number, row in zip(chosen, checked(pool.names[model], found)):
                scores[number][model] = row


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


@compiled_by_model(static_argnames="measure")
def _scorer(network, tokens, segments, positions, predicted, mask_id, *, measure):
    """What is measured at each column but the first, [rows, columns - 1, ...]. predicted: columns
    whose tokens an encoder predicts."""
    if network.config.causal:
        hidden = network.hidden(tokens[:, :-1], positions[:, :-1], segments[:, :-1])
        return measure(*network.output(hidden), tokens[:, 1:])

    def predict(phase):
        masked = predicted & (jnp.arange(tokens.shape[1]) % APART == phase)[None]
        hidden = network.hidden(jnp.where(masked, mask_id, tokens), positions, segments)
        # Every APART-th column alone passes the head.
        hidden = hidden.reshape(-1, APART, hidden.shape[-1])[:, phase]
        return measure(*network.output(hidden), tokens.reshape(-1, APART)[:, phase])

    found = jnp.moveaxis(jax.lax.map(predict, jnp.arange(APART)), 0, 1)
    return found.reshape(*tokens.shape, *found.shape[2:])[:, 1:]


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
    """Columns of rows: one number for all short windows, then powers of two, and the longest."""
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
    """Windows in rows of `size` columns, at multiples of `unit`: the longest first, each in the
    fullest row with space."""
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
