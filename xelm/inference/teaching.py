"""What an ensemble predicts along documents, for a student that is trained on it."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from xelm.inference.pool import Pool
from xelm.inference.predictions import Likeliest, likeliest_of_mixture, read_upto
from xelm.inference.route import Walk
from xelm.inference.scoring import decide_along, targets, unpredicted
from xelm.inference.work import finish

_STATE_VALUES = 2**26
"""Values of hidden states of all models in memory at once: 256 MiB."""
_LEAST_TOKENS, _MOST_TOKENS = 2**12, 2**16
"""Tokens that are read before their predictions are written: fewer waste a compiled batch, more are
lost when a process is killed."""


class Lesson(NamedTuple):
    """What an ensemble predicts along some documents."""

    predictions: list[Likeliest]
    """The likeliest tokens at each of the `scoring.targets` of each document."""
    tokens_read: int
    """Tokens that were read, by all models together."""


def tokens_at_once(pool: Pool) -> int:
    """Number of tokens of documents that are well given to `teach` at once."""
    most = _STATE_VALUES // (len(pool.names) * pool.model.width)
    return min(max(most, _LEAST_TOKENS), _MOST_TOKENS)


def teach(
    pool: Pool,
    documents: Sequence[Int[np.ndarray, " _"]],
    top: int,
    language: str | None = None,
) -> Lesson:
    """The `top` likeliest tokens of the mixture at each target of some documents, read and weighed
    as `xelm evaluate` does: each document alone, in windows, with the router's weights before each
    token. language: that the router is told. At a first token that nothing stands before there is
    no prediction: ids and log probabilities are 0."""
    form = pool.tokenizer.text_format
    first = unpredicted(pool.model, form)
    wanted = [targets(pool.model, np.asarray(ids, np.int64), form) for ids in documents]
    walks = [Walk(pool.router, language, ids, np.arange(first, len(ids))) for ids in wanted]
    decisions, _, read = finish(decide_along(pool, walks, documents, pool.reading))
    log_weights = [decision.log_weights for decision in decisions]
    models = [partial(pool.parameters.__getitem__, index) for index in range(len(pool.names))]
    found = likeliest_of_mixture(pool.model, models, documents, log_weights, top, **pool.reading)
    padding = ((first, 0), (0, 0))
    padded = [Likeliest(*(np.pad(each, padding) for each in one)) for one in found]
    count = sum(len(ids) * len(models) for ids, models in zip(documents, read))
    for index in range(len(pool.names)):
        upto = read_upto(pool.model, documents, [weights[:, index] for weights in log_weights])
        count += sum(upto.values())
    return Lesson(padded, count)
