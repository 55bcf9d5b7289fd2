"""Mean states of a model over whole documents, layer by layer."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from xelm.models.config import ModelConfig
from xelm.models.parameters import compiled_by_model, graph

ROWS_A_BATCH = 16
"""Number of documents that are read at once."""


def document_states(
    model: ModelConfig,
    parameters: Any,
    documents: Sequence[Integer[np.ndarray, " _"]],
    *,
    sequence_length: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Float[np.ndarray, "documents layers D"]:
    """Mean, over the tokens of each document, of the states after each layer, float32. The first
    `sequence_length` tokens of longer documents are read; no document is empty. progress: called
    with numbers of tokens that were read."""
    read = _compiled(model, "float32")
    found = []
    for first in range(0, len(documents), ROWS_A_BATCH):
        part = [ids[:sequence_length] for ids in documents[first : first + ROWS_A_BATCH]]
        tokens = np.zeros((ROWS_A_BATCH, sequence_length), np.int32)
        valid = np.zeros(tokens.shape, bool)
        for row, ids in enumerate(part):
            tokens[row, : len(ids)] = ids
            valid[row, : len(ids)] = True
        means = np.asarray(read(parameters, tokens, valid))
        found.append(means[:, : len(part)].swapaxes(0, 1))
        progress(sum(map(len, part)))
    return np.concatenate(found)


@compiled_by_model(graph)
def _compiled(network, tokens, valid):
    return network.means(tokens, valid=valid)
