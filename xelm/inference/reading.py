"""What each expert reads in a step: the last token of sequences that grow, and pieces of prompts as
far as a budget of tokens and the memory allow.

A *reading* is an expert that reads sequences in the vocabulary of the pool (its number), or in its
own where that is another one (-1 minus its number), as a router needs it."""

import bisect
import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from xelm.inference.blocks import Text
from xelm.inference.decoder import TOKENS_A_CALL, Decoder, NoMemory, out_of_memory, tokens_within
from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.pool import Pool, parameter_bytes
from xelm.inference.route import IMPOSSIBLE
from xelm.inference.running import RunningSequence, SpelledSequence
from xelm.inference.spelling import spell

PROMPT_TOKENS = {"cpu": 64}
"""Tokens of prompts that are read in a step beside others, by platform: about as many as take as
long as a step of a few dozen sequences, so that reading at most doubles its time."""
PROMPT_TOKENS_ELSEWHERE = 512


Piece = tuple[RunningSequence, int]
"""A sequence, and the number of ids up to which one of its experts reads it."""


class Reader:
    """The experts' caches, and what is read next. Memory and turns go to older sequences first."""

    def __init__(self, pool: Pool, prompt_tokens: int | None, keep: int):
        """prompt_tokens: as in `Engine`. keep: as in `Decoder`."""
        self._pool, self._budget, self._keep = pool, prompt_tokens, keep
        self.decoders: dict[int, Decoder] = {}
        """By reading, of those in which anything was read."""
        self.failed: list[tuple[RunningSequence, Exception]] = []
        """Sequences that cannot be continued, with a MemoryError where there is no memory for them;
        their texts are closed."""
        self._shortest_first, self._left = False, math.inf

    def read(
        self,
        sequences: Sequence[RunningSequence],
        experts: Sequence[int],
        some: Sequence[RunningSequence] | None = None,
    ) -> None:
        """Has experts, in this order, read what sequences require of them, or some sequences with
        what is left of the budget of this step. Afterwards those that are `ready` have been read
        completely."""
        readings = (reading for expert in experts for reading in (-1 - expert, expert))
        order = {reading: place for place, reading in enumerate(readings)}
        if some is None:
            some = sequences
        while pieces := self._pieces(sequences, order, some):
            for reading in sorted(pieces, key=order.__getitem__):
                self._read_by(reading, pieces[reading], sequences)
            if self._budget is not None or all(sequence.ready for sequence in some):
                return

    def _pieces(
        self,
        sequences: Sequence[RunningSequence],
        order: Mapping[int, int],
        some: Sequence[RunningSequence],
    ) -> dict[int, dict[Text, Piece]]:
        """What is read next in each reading. order: reading -> its place in the order."""
        pieces: dict[int, dict[Text, Piece]] = {}
        failed = [sequence for sequence, _ in self.failed]
        for sequence in (one for one in self._by_turn(some) if one not in failed):
            for reading in sorted(sequence.required, key=order.__getitem__):
                unread = sequence.unread(reading)
                if not unread or (unread > 1 and self._left <= 0):
                    continue
                text = self._text(sequence, reading, sequences)
                if text is None:
                    continue
                unread = sequence.unread(reading)
                if reading < 0:
                    unread = min(unread, self._pool.longest - len(text.ids))
                count = self._spent(self.decoders[reading], text, unread)
                pieces.setdefault(reading, {})[text] = sequence, len(text.ids) + count
        return pieces

    def _spell(self, sequences: Sequence[RunningSequence]) -> None:
        """Spells what is new of sequences in the own vocabularies of experts that read them so."""
        for sequence in sequences:
            for reading in sequence.required:
                if reading >= 0:
                    continue
                spelled = sequence.spelled.setdefault(reading, SpelledSequence())
                first, known = spelled.covered, len(sequence.request.ids)
                ids = np.asarray(sequence.ids[first:], np.int64)
                if len(ids):
                    own = self._pool.own[-1 - reading].vocabulary
                    mask = np.asarray(sequence.mask[first:], bool)
                    more = spell(ids, self._pool.vocabulary, own, max(0, known - first), mask)
                    spelled.add(more.ids.tolist(), more.places.tolist(), len(ids))

    def close(self) -> None:
        """Frees all memory."""
        for decoder in self.decoders.values():
            decoder.reset()

    def release(self, sequence: RunningSequence, readings: Iterable[int] | None = None) -> None:
        """Closes the texts of a sequence, of some readings or all."""
        for reading in list(sequence.texts if readings is None else readings):
            self.decoders[reading].close(sequence.texts.pop(reading))

    def begin_step(self, sequences: Sequence[RunningSequence], tokens_read: float = 0) -> None:
        """Spells what is new of sequences, and sets the number of tokens of prompts that are read
        in a step: no limit if there is none, and many where no sequence waits for its next token.
        tokens_read: how many of them were read elsewhere; however many that are, the smallest piece
        is read here."""
        self._spell(sequences)
        self._left = math.inf
        if self._budget is not None:
            growing = any(all(s.unread(e) <= 1 for e in s.required) for s in sequences)
            budget = self._budget if growing else max(self._budget, TOKENS_A_CALL)
            self._left = max(1, budget - tokens_read)

    def _spent(self, decoder: Decoder, text: Text, unread: int) -> int:
        """How many of the unread ids of a text are read with what is left of the budget: at least
        the smallest piece. Ids behind a long text cost more."""
        if unread == 1 or self._budget is None:
            return unread
        cost = decoder.cost(text)
        count = tokens_within(self._left / cost, unread)
        self._left -= count * cost
        return count

    def _by_turn(self, sequences: Sequence[RunningSequence]) -> list[RunningSequence]:
        """Sequences in the order in which they get the budget: in turns the oldest first, so that
        each prompt is read in the end, and those with the least left, so that no short prompt waits
        for a long one."""
        if self._budget is None:
            return list(sequences)
        self._shortest_first = not self._shortest_first
        if not self._shortest_first:
            return list(sequences)
        return sorted(sequences, key=lambda s: max(map(s.unread, s.required), default=0))

    def _scored(self, sequence: RunningSequence, reading: int) -> bool:
        """Whether the log probabilities of the ids that are read are wanted."""
        wanted = sequence.log_likelihoods is not None and reading not in self._pool.own
        return reading < 0 or wanted

    def _text(
        self, sequence: RunningSequence, reading: int, sequences: Sequence[RunningSequence]
    ) -> Text | None:
        """The sequence in the cache of a reading; None if there is no memory for it now, or another
        text that begins alike is being read first."""
        text, scored = sequence.texts.get(reading), self._scored(sequence, reading)
        decoder = self._decoder(reading)
        if text is not None and reading < 0 and len(text.ids) >= self._pool.longest:
            sequence.spelled[reading].slide(self._pool.longest)
            self.release(sequence, [reading])
            text = None
        if text is not None:
            if scored and text.scores is None:
                decoder.rewind(text)  # read again: its scores were not kept
            return text
        source = decoder.source_to_come(sequence.target(reading))
        # An expert that has lost its weight in the other text reads no more of that.
        if source and any(
            one.texts.get(reading) is source and reading in one.required for one in sequences
        ):
            return None
        expected = len(sequence.request.ids) + sequence.request.sampling.max_new_tokens
        while True:
            try:
                # Without a budget all is known in advance, and memory is allocated at once.
                reserved = expected if self._budget is None else 0
                text = decoder.open(sequence.target(reading), reserved, scored=scored)
            except NoMemory:
                if not self._give_way(sequence, sequences):
                    return None
            else:
                sequence.texts[reading] = text
                return text

    def _decoder(self, reading: int) -> Decoder:
        if reading not in self.decoders:
            model = self._pool.model
            parameters = functools.partial(self._pool.parameters.__getitem__, reading)
            if reading < 0:
                own = self._pool.own[-1 - reading]
                model, parameters = own.model, own.parameters
            self.decoders[reading] = Decoder(
                model,
                parameters,
                self._pool.dtype,
                memory=self._account,
                keep=self._keep,
            )
        return self.decoders[reading]

    def _read_by(
        self, reading: int, pieces: dict[Text, Piece], sequences: Sequence[RunningSequence]
    ) -> None:
        decoder = self.decoders[reading]
        while pieces := {text: piece for text, piece in pieces.items() if text.open}:
            scored = any(self._scored(one, reading) for one, _ in pieces.values())
            unread = {
                text: one.target(reading)[len(text.ids) : end]
                for text, (one, end) in pieces.items()
            }
            try:
                decoder.read(unread, scored=scored)
            except NoMemory:
                # A text of this step outgrew its block: whoever came last gives way.
                oldest = next(s for s in sequences if s.texts)
                self._give_way(oldest, sequences)
            except jax.errors.JaxRuntimeError as error:
                if not out_of_memory(error):
                    raise
                self._lost(reading, sequences)
                self._fail_for_memory(max(pieces.values(), key=lambda piece: piece[1])[0])
                return
            else:
                break
        for text, (sequence, _) in pieces.items():
            if reading < 0:
                _count_spelled(sequence, reading, text)
            elif self._scored(sequence, reading):
                _count(sequence, reading, text)

    def _give_way(
        self, asking: RunningSequence, sequences: Sequence[RunningSequence]
    ) -> RunningSequence | None:
        """Frees the memory of the sequence that came last, if it came after the one that asks, and
        returns it. If no other has any memory, the asking one closes its texts that it does not
        need or, if there are none, fails; but where sequences of other pools have memory, it closes
        all of its own, so that no two wait for each other."""
        holding = [one for one in sequences if one.texts]
        later = sequences[sequences.index(asking) + 1 :]
        if holding and holding[-1] in later:
            self.release(holding[-1])
            return holding[-1]
        if any(one is not asking for one in holding):
            return None
        if self._others_hold():
            self.release(asking)
            return None
        if idle := [one for one in asking.texts if one not in asking.required]:
            self.release(asking, idle)
            return asking
        account = self._account
        if account is None:
            self._fail_for_memory(asking)
            return None
        free = max(0.0, account.device_bytes - parameter_bytes(self._pool)) / 1e9
        message = (
            f"the keys and values of {len(asking.ids)} tokens, by each expert that reads them, "
            f"take more than the {free:.2f} GB of memory beside the parameters of one model"
        )
        self.fail(asking, MemoryError(message))
        return None

    @property
    def _account(self) -> ParameterCache | None:
        """The account of memory; None if that is not limited."""
        cache = self._pool.parameters
        return cache if isinstance(cache, ParameterCache) else None

    def _others_hold(self) -> bool:
        """Whether sequences of other pools have any of the memory."""
        own = sum(decoder.bytes for decoder in self.decoders.values())
        return self._account is not None and self._account.reserved > own

    def fail(self, sequence: RunningSequence, error: Exception) -> None:
        """Gives up a sequence, and its memory."""
        self.release(sequence)
        self.failed.append((sequence, error))

    def _fail_for_memory(self, sequence: RunningSequence) -> None:
        message = f"the device is out of memory ({len(sequence.ids)} tokens)"
        self.fail(sequence, MemoryError(message))

    def _lost(self, reading: int, sequences: Sequence[RunningSequence]) -> None:
        """Forgets all that was read in a reading: a call that ran out of memory leaves nothing
        whose contents are known. Sequences are read again."""
        self.decoders[reading].reset()
        for sequence in sequences:
            sequence.texts.pop(reading, None)


def _count(sequence: RunningSequence, expert: int, text: Text) -> None:
    """Adds to an expert's log-likelihood that of ids that it has read and that count."""
    assert text.scores is not None
    first = max(1, sequence.counted.get(expert, 0))  # the very first id follows nothing
    last = len(text.ids)
    if last <= first:
        return
    mask = np.asarray(sequence.mask[first:last], bool)
    scores = np.asarray(text.scores[first:last])[mask]
    sequence.count(expert, np.maximum(scores, IMPOSSIBLE))
    sequence.counted[expert] = last


def _count_spelled(sequence: RunningSequence, reading: int, text: Text) -> None:
    """The same for an expert that reads the sequence in its own vocabulary, once it has read all:
    what it gives to each id of the sequence is what it gives to the ids that end with it."""
    assert text.scores is not None
    spelled, expert = sequence.spelled[reading], -1 - reading
    spelled.take_scores(text.scores)
    first = sequence.counted.get(expert, 0)
    if len(spelled.scores) < len(spelled.ids) or first == spelled.covered:
        return
    new = bisect.bisect_left(spelled.places, first)
    total = np.zeros(spelled.covered - first)
    places = np.asarray(spelled.places[new:], np.int64) - first
    scores = np.asarray(spelled.scores[new:])
    scores[: new == 0] = 0.0  # the very first follows nothing
    np.add.at(total, places, scores)
    mask = np.asarray(sequence.mask[first : spelled.covered], bool)
    sequence.count(expert, np.maximum(total[mask], IMPOSSIBLE))
    sequence.counted[expert] = spelled.covered


def prompt_tokens_per_step() -> int:
    """Number of tokens of prompts that are read in a step beside others, where none is given."""
    return PROMPT_TOKENS.get(jax.default_backend(), PROMPT_TOKENS_ELSEWHERE)
