"""Held-out text of a training: its batches, and the loss on it at some of the steps."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from xelm.data.masking import mask_tokens
from xelm.data.rows import ORIGIN, LanguageRows, LanguageShare
from xelm.data.text_format import TextFormat
from xelm.models.config import ModelConfig
from xelm.training_config import TrainConfig


class HeldOutText:
    """Held-out documents of a training, packed into batches as its own text is."""

    def __init__(
        self,
        sources: Sequence[LanguageShare],
        config: TrainConfig,
        model: ModelConfig,
        text_format: TextFormat,
    ):
        """sources: documents by language; of each, the first `config.evaluation.tokens` are read.
        They are fewer, but at least 1024, where a measurement would read more than a thirtieth of
        the training's tokens. Rows of an encoder are masked alike in every measurement."""
        length, rows = config.sequence_length, []
        budget = config.steps * config.tokens_per_step // (30 * max(1, len(sources)))
        most = min(config.evaluation.tokens, max(1024, budget))
        self.languages = [source.ids.language for source in sources]
        """Language of each source; several may have the same."""
        self._shares = np.asarray([source.share for source in sources])
        for index, source in enumerate(sources):
            packed = LanguageRows(source, config, text_format, index)
            count = min(len(packed), -(-most // length))
            rows += [packed[row] for row in range(count)]
        self._row_languages = np.asarray([row["language"] for row in rows], int)
        # An encoder predicts the tokens of a document; a decoder its end too, and its first token
        # only after a start.
        more = int(model.causal) - int(model.causal and text_format.start_id is None)
        self._targets, self._bytes = np.asarray([_sizes(s, more) for s in sources]).reshape(-1, 2).T
        self.batches: list[dict[str, np.ndarray]] = []
        """Arrays of the rows, as a step reads them; the last batch is filled up with empty rows."""
        for first in range(0, len(rows), config.batch_size):
            part = rows[first : first + config.batch_size]
            filled = [(0, config.batch_size - len(part)), (0, 0)]
            names = [name for name in part[0] if name not in ORIGIN]
            batch = {name: np.pad([row[name] for row in part], filled) for name in names}
            if not model.causal:
                batch = mask_tokens(batch, config, text_format, first)
            self.batches.append(batch)

    def measurement(self, nats: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
        """The line of held_out.jsonl for these sums over the rows of all batches, [rows]: "loss",
        nats a target, the mean over languages by their shares, and "bits_per_byte" by language. A
        loss that is not finite is None."""
        count = len(self._row_languages)
        sums, counts = (
            np.bincount(self._row_languages, each[:count], len(self.languages))
            for each in (nats, targets)
        )
        means = sums / np.maximum(counts, 1)
        known = np.where(counts > 0, self._shares, 0.0)
        loss = float((means * known).sum() / known.sum())
        if not math.isfinite(loss):
            return {"loss": None, "bits_per_byte": {}}
        bits = {}
        for tag in dict.fromkeys(self.languages):
            own = (np.asarray(self.languages) == tag) & (counts > 0)
            if own.any():
                nats_of_all = (means * self._targets)[own].sum()
                bits[tag] = float(nats_of_all / max(1, self._bytes[own].sum()) / math.log(2))
        return {"loss": loss, "bits_per_byte": bits}


def _sizes(source: LanguageShare, more: int) -> tuple[int, int]:
    """Targets and bytes of the documents of a source. more: targets of a document beyond its
    tokens."""
    ids, numbers = source.ids, source.documents
    numbers = np.arange(len(ids)) if numbers is None else numbers
    return int(ids.lengths[numbers].sum()) + more * len(numbers), int(ids.bytes[numbers].sum())
