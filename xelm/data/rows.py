"""Packed rows of fixed length from tokenised documents, mixed over languages.

A language's documents are laid end to end in the shuffled order of the store, each as [start,
ids..., end] or, where no token starts a text, [ids..., end]; row r contains tokens r*T to (r+1)*T
of that stream, the last as a target only, so that every token but the first of a document is
predicted once a pass. In each pass the rows are shuffled by the random seed. Batch i is a pure
function of that seed and i: a resumed training needs no other state than its step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, cast

import grain
import numpy as np
from jaxtyping import Int

from clustering.errors import UserError
from xelm.data.store import FRAME, TokenizedLanguage
from xelm.data.teacher import TeacherText
from xelm.data.text_format import TextFormat
from xelm.training_config import TrainConfig

ORIGIN = ("language", "row")
"""Entries of a batch with the index of each row's language, and the row's number there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageShare:
    """Documents of one language for a training, and their share of its rows."""

    ids: TokenizedLanguage
    """All documents of the language."""
    share: float
    """Share of the rows of the training, relative to the other shares."""
    documents: Int[np.ndarray, " documents"] | None = None
    """Numbers of the documents to use; None means all."""
    teacher: TeacherText | None = None
    """What a teacher predicts along these documents, if it is distilled."""

    @property
    def numbers(self) -> Int[np.ndarray, " documents"]:
        """Numbers of the documents."""
        return np.arange(len(self.ids)) if self.documents is None else self.documents

    @property
    def tokens(self) -> int:
        """Number of tokens of one pass over these documents, special tokens included."""
        if self.documents is None:
            return int(self.ids.stream_ends[-1]) if len(self.ids) else 0
        return int((self.ids.lengths[self.documents] + FRAME).sum())


class LanguageRows:
    """Random access to the packed rows of one language; a grain data source."""

    def __init__(
        self, source: LanguageShare, config: TrainConfig, text_format: TextFormat, index: int = 0
    ):
        """index: that of the language among those of the training."""
        self.ids, self.teacher = source.ids, source.teacher
        self.text_format = text_format
        ids = source.ids
        frame = len(text_format.framed([]))
        if source.documents is None:
            self.order, self.ends = ids.order, ids.stream_ends
            if frame != FRAME:  # which the store counts with
                self.ends = self.ends - (FRAME - frame) * np.arange(1, len(self.ends) + 1)
        else:
            chosen = np.zeros(len(ids), bool)
            chosen[source.documents] = True
            self.order = ids.order[chosen[ids.order]]
            self.ends = np.cumsum(ids.lengths[self.order] + frame)
        # Depends on the language and not on its index, so that every training with the same random
        # seed reads a language in the same order, whatever other languages it has.
        random = np.random.default_rng([config.random_seed, *ids.language.encode()])
        self.row_seed = int(random.integers(2**31))
        self.sequence_length, self.language_index = config.sequence_length, index

    @property
    def tokens(self) -> int:
        """Length of the stream, special tokens counted."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def __len__(self) -> int:
        return -(-max(0, self.tokens - 1) // self.sequence_length)

    def __getitem__(self, record_key: SupportsIndex) -> dict[str, Any]:
        """tokens, segments, positions: int32 [T + 1]. Segment 0 is padding; positions count from
        the start of the document or of the row, whichever is later. And the two of `ORIGIN`.

        With a teacher, also what it predicts of the tokens from the second on: teacher_ids, int32
        [T, n], teacher_log_probabilities, float16 [T, n], and its teacher_share, float32."""
        size = self.sequence_length + 1
        start = int(record_key) * self.sequence_length
        tokens = np.zeros(size, np.int32)
        segments = np.zeros(size, np.int32)
        positions = np.zeros(size, np.int32)
        predicted = self._predicted(size)
        document = int(np.searchsorted(self.ends, start, side="right"))
        filled, segment = 0, 0
        while filled < size and document < len(self.ends):
            begin = int(self.ends[document - 1]) if document else 0
            framed = self.text_format.framed(self.ids.document(self.order[document]))
            offset = start + filled - begin
            piece = framed[offset:][: size - filled]
            segment += 1
            part = slice(filled, filled + len(piece))
            tokens[part], segments[part] = piece, segment
            positions[part] = np.arange(len(piece))
            if self.teacher is not None:
                # Its first target is the token after the start.
                start_tokens = len(self.text_format.start_ids)
                lead = max(0, start_tokens - offset)
                first, count = offset + lead - start_tokens, len(piece) - lead
                found = self.teacher.document(int(self.order[document]))
                for array, values in zip(predicted.values(), found):
                    array[part][lead:] = values[first : first + count]
            filled += len(piece)
            document += 1
        return {
            "tokens": tokens,
            "segments": segments,
            "positions": positions,
            "language": np.int32(self.language_index),
            "row": np.int64(record_key),
            **{name: array[1:] for name, array in predicted.items()},
            **({} if self.teacher is None else {"teacher_share": np.float32(self.teacher.share)}),
        }

    def _predicted(self, size: int) -> dict[str, np.ndarray]:
        """Arrays for what a teacher predicts of so many tokens; none without a teacher."""
        if self.teacher is None:
            return {}
        shape = (size, self.teacher.ids.shape[1])
        return {
            "teacher_ids": np.zeros(shape, np.int32),
            "teacher_log_probabilities": np.zeros(shape, np.float16),
        }


def documents_read(
    source: LanguageShare, rows: int, config: TrainConfig, text_format: TextFormat
) -> Int[np.ndarray, " documents"]:
    """Numbers of the documents, ascending, of which a training reads a part in its first `rows`
    rows of a source."""
    packed = LanguageRows(source, config, text_format)
    if rows >= len(packed):
        return np.sort(packed.order)
    shuffled = _shuffled(grain.MapDataset.range(len(packed)), packed)
    chosen = np.asarray([shuffled[number] for number in range(rows)], int)
    starts = chosen * packed.sequence_length
    first = np.searchsorted(packed.ends, starts, side="right")
    # A row ends with the token at which the next one starts.
    last = np.searchsorted(packed.ends, starts + packed.sequence_length, side="right")
    edges = np.zeros(len(packed.order) + 1, int)
    np.add.at(edges, first, 1)
    np.add.at(edges, np.minimum(last, len(packed.order) - 1) + 1, -1)
    return np.sort(packed.order[np.cumsum(edges[:-1]) > 0])


def _shuffled(dataset: Any, rows: LanguageRows) -> Any:
    """The rows of a language without end, shuffled anew in every pass over them."""
    return dataset.seed(rows.row_seed).shuffle().repeat()


def batches(
    sources: Sequence[LanguageShare],
    config: TrainConfig,
    text_format: TextFormat,
    *,
    first_step: int = 0,
) -> Any:
    """Iterates over the batches of a training from step first_step on: dictionaries of int32
    [batch_size, T + 1] arrays (see `LanguageRows`), and the `ORIGIN` of each row. Languages are
    mixed as in `_Interleaved`; each language's rows are shuffled anew in every pass over them."""
    batch_size, count = config.batch_size, config.steps * config.batch_size
    datasets, shares = [], []
    for index, source in enumerate(sources):
        rows = LanguageRows(source, config, text_format, index)
        if len(rows) == 0:
            raise ValueError(f"no document to train on in {source.ids.language}")
        # Grain's types want more methods; it uses only these two.
        source_of_rows = cast(grain.sources.RandomAccessDataSource, rows)
        datasets.append(_shuffled(grain.MapDataset.source(source_of_rows), rows))
        shares.append(source.share)
    interleaved = _Interleaved(shares, count, batch_size, config.random_seed)
    mixed = grain.MapDataset.select_from_datasets(datasets, interleaved)
    rows = mixed.slice(slice(first_step * batch_size, count))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * batch_size)
    return iter(rows.to_iter_dataset(options).batch(batch_size))


class _Interleaved(grain.transforms.DatasetSelectionMap):
    """Number of a row in the mixture -> its source and its number there. After any number of rows
    each source is within a few rows of its share; the shares of `grain.MapDataset.mix` are rounded
    to a hundredth of the smallest.

    If batches are too small for all sources, equal shares would put the same few together
    throughout. Then every window of as many rows as there are sources is shuffled; the rows of each
    source stay in their order.
    """

    def __init__(self, shares: Sequence[float], length: int, batch_size: int, random_seed: int):
        self.parts = [max(1, round(share / sum(shares) * 2**40)) for share in shares]
        self.length, self.random_seed = length, random_seed
        self.window = len(shares) if batch_size < len(shares) else 1
        self._known: tuple[int, list[tuple[int, int]]] = (-1, [])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, int]:
        window, place = divmod(index, self.window)
        if self._known[0] != window:
            self._known = window, self._window(window)
        return self._known[1][place]

    def _window(self, window: int) -> list[tuple[int, int]]:
        begin = window * self.window
        rows = [self._even(row) for row in range(begin, min(begin + self.window, self.length))]
        waiting: dict[int, list[int]] = {}
        for source, number in reversed(rows):
            waiting.setdefault(source, []).append(number)
        order = np.random.default_rng([self.random_seed, window]).permutation(len(rows))
        sources = [rows[place][0] for place in order]
        return [(source, waiting[source].pop()) for source in sources]

    def _even(self, index: int) -> tuple[int, int]:
        # Of the rows up to here, the first source takes its part, the second its part of the rest
        # and so on; this row belongs to the source whose count it raises.
        before, after, remaining = index, index + 1, sum(self.parts)
        for source, part in enumerate(self.parts):
            rest_before = _rounded(before * (remaining - part), remaining)
            rest_after = _rounded(after * (remaining - part), remaining)
            if after - rest_after > before - rest_before:
                return source, before - rest_before
            before, after, remaining = rest_before, rest_after, remaining - part
        raise AssertionError(f"row {index} has no source")


def _rounded(dividend: int, divisor: int) -> int:
    return (2 * dividend + divisor) // (2 * divisor)


def sampling_shares(
    tokens: Mapping[str, int], exponent: float, *, budget: int = 0, max_passes: float | None = None
) -> dict[str, float]:
    """Share of each language in a training of `budget` tokens: in proportion to its tokens **
    exponent (Conneau et al. 2020, section 3.1; 0 is uniform, 1 proportional), but so that none is
    passed over more than `max_passes` times, if there is such a limit: what one may not have, the
    others get in the same proportion. With exponent 0 this is UniMax (Chung et al. 2023, arXiv
    2304.09151, algorithm 1). UserError if all together have not enough text."""
    most = dict.fromkeys(tokens, math.inf)
    if max_passes is not None:
        most = {language: max_passes * count / budget for language, count in tokens.items()}
        if sum(most.values()) < 1 - 1e-9:
            raise UserError(
                f"{max_passes:g} passes over {sum(tokens.values()):,} tokens are fewer than the "
                f"{budget:,} to train on; raise max_passes, or lower tokens"
            )
    weights = {language: float(count) ** exponent for language, count in tokens.items()}
    shares: dict[str, float] = {}
    while len(shares) < len(tokens):
        rest = {tag: weight for tag, weight in weights.items() if tag not in shares}
        left = (1.0 - sum(shares.values())) / sum(rest.values())
        full = {tag: most[tag] for tag, weight in rest.items() if weight * left > most[tag]}
        shares |= full or {tag: weight * left for tag, weight in rest.items()}
    return {language: shares[language] for language in tokens}
