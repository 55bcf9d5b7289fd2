"""Continuations of a batch of texts by an ensemble, token by token."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from clustering.errors import UserError
from xelm.data.tokenizer import Tokenizer
from xelm.data.unicode import composed_and_decomposed
from xelm.inference.decoding import padded
from xelm.inference.engine import Engine, Text
from xelm.inference.sampling import Sampling
from xelm.inference.scoring import check_ids

if TYPE_CHECKING:
    from xelm.inference.ensemble import Ensemble

Stream = Callable[[int, str], object]
"""Told the number of a prompt and the next piece of its continuation."""
MOST_SLOTS = 2**16
"""Tokens for which a cache has room, of a batch that is not parted by lengths."""
# Enough for the tokenizer to see that what follows stands in the middle of a text.
IDS_BEFORE = 8
# Of a continuation: more than one character has; decoded again with each new id.
IDS_PENDING = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """A continuation."""

    text: str
    """Without the prompt."""
    ids: Sequence[int]
    """Its subword ids."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Expert -> its mean routing weight over the generated tokens."""
    routing: str = ""
    """The router that decided most of these tokens: "language" where the text was said to be in a
    language that an expert serves, otherwise one of `routers.ROUTINGS` or the model that it left
    them to."""


def generate(
    ensemble: "Ensemble",
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    languages: Sequence[str | None],
    stream: Stream = lambda number, piece: None,
    user_masks: Sequence[Sequence[bool] | None] | None = None,
) -> list[Generation]:
    """Continues each text of ids until an end token, a stop string or `max_new_tokens`. A prompt
    that leaves no room for so many is refused. user_masks: one for each prompt, as `Engine.add` has
    it."""
    for ids in prompts:
        check_prompt(ensemble, ids, sampling.max_new_tokens)
    replies = [Reply(ensemble.tokenizer, ids, sampling.stop) for ids in prompts]
    weights = np.zeros((len(prompts), len(ensemble.names)))
    drawn = np.zeros(len(prompts), int)
    texts: dict[int, Text] = {}
    for numbers in _side_by_side([len(ids) + sampling.max_new_tokens for ids in prompts]):
        engine = Engine(ensemble)
        longest = max(len(prompts[number]) for number in numbers)
        engine.reserve(len(numbers), longest + sampling.max_new_tokens)
        for number in numbers:
            texts[number] = engine.add(
                prompts[number],
                sampling,
                language=languages[number],
                number=number,
                user_mask=None if user_masks is None else user_masks[number],
            )
        _continue(engine, ensemble.tokenizer.end_ids, sampling, replies, weights, drawn, stream)
    for number, reply in enumerate(replies):
        stream(number, reply.rest())
    return [
        Generation(
            text=reply.text,
            ids=reply.ids,
            weights=dict(zip(ensemble.names, (mean / count).tolist())),
            routing=texts[number].routing,
        )
        for number, (reply, mean, count) in enumerate(zip(replies, weights, drawn))
    ]


def _side_by_side(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of texts that are continued together: all, or where that would take much memory
    because one is long, those of about one length (every text has as many places of a cache)."""
    slots = [padded(length) for length in lengths]
    if len(slots) * max(slots, default=0) <= MOST_SLOTS:
        return [list(range(len(slots)))] if slots else []
    groups: dict[int, list[int]] = {}
    for number, size in enumerate(slots):
        groups.setdefault(size, []).append(number)
    return list(groups.values())


def _continue(
    engine: Engine,
    end_ids: Container[int],
    sampling: Sampling,
    replies: Sequence["Reply"],
    weights: np.ndarray,
    drawn: np.ndarray,
    stream: Stream,
) -> None:
    """Continues the texts of an engine to their ends, and counts and sums up by their numbers."""
    while engine.texts:
        for text, token, spoken in engine.step():
            number, reply = text.number, replies[text.number]
            weights[number] += spoken
            drawn[number] += 1
            if token in end_ids:
                reply.finished = True
            else:
                stream(number, reply.add(token))
            if reply.finished or text.drawn == sampling.max_new_tokens:
                engine.remove(text)


class Reply:
    """The text of a continuation, which grows by ids and is told in pieces that are final."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
        self.ids: list[int] = []
        self.text = ""
        """All of it so far, up to a stop string."""
        self.finished = False
        # A model may write a character composed or decomposed, whatever the stop string has.
        self._stop = [form for text in stop for form in composed_and_decomposed(text)]
        self._tokenizer = tokenizer
        # Decoded behind others: a leading space would be lost alone.
        self._before = _whole_characters(tokenizer, list(prompt)) or list(prompt)
        self._skipped = len(tokenizer.decode(self._before))
        self._settled, self._pending = "", []
        self._told = ""

    def add(self, token: int) -> str:
        """One more id; returns what is certain by now and was not told before."""
        self.ids.append(token)
        self._pending.append(token)
        text = (
            self._settled + self._tokenizer.decode([*self._before, *self._pending])[self._skipped :]
        )
        # What was told stays, even if more bytes now make nonsense of those before them.
        text = self._told + text[len(self._told) :]
        # None begins in what was told.
        ends = [place for s in self._stop if (place := text.find(s, len(self._told))) >= 0]
        if ends:
            self.finished = True
            self.text = text[: min(ends)]
            return self.rest()
        self.text = text
        # A character may lack bytes yet, and the end may be the beginning of a stop string.
        whole = text.rstrip("\ufffd")
        certain = len(whole)
        for stop in self._stop:
            for size in range(1, min(len(stop), len(whole) + 1)):
                if whole.endswith(stop[:size]):
                    certain = min(certain, len(whole) - size)
        # Soon where nothing is held back; where a stop string may have begun, not for ever.
        most = IDS_PENDING if certain == len(text) else 4 * IDS_PENDING
        if len(self._pending) >= most and whole == text:
            self._settle(text)
        return self._tell(certain)

    def rest(self) -> str:
        """What was not told yet, at the end; a last character that lacks bytes is left out."""
        certain = len(self.text.rstrip("\ufffd"))
        self.text = self.text[: max(certain, len(self._told))]
        return self._tell(len(self.text))

    def _settle(self, text: str) -> None:
        """Nothing that comes changes this text any more: that is decoded behind its last ids."""
        before = _whole_characters(self._tokenizer, [*self._before, *self._pending])
        if before is not None:
            self._before, self._skipped = before, len(self._tokenizer.decode(before))
            self._settled, self._pending = text, []

    def _tell(self, end: int) -> str:
        piece = self.text[len(self._told) : end]
        self._told += piece
        return piece


def _whole_characters(tokenizer: Tokenizer, ids: list[int]) -> list[int] | None:
    """The last of some ids, from the beginning of a character, which may have four bytes; None
    where none is found."""
    for size in range(IDS_BEFORE, IDS_BEFORE + 4):
        if "\ufffd" not in tokenizer.decode(ids[-size:]):
            return ids[-size:]
    return None


def room(ensemble: "Ensemble", prompts: Sequence[Sequence[int]]) -> int:
    """Tokens by which all of these texts can grow."""
    return ensemble.longest - max(map(len, prompts), default=0)


def check_prompt(ensemble: "Ensemble", ids: Sequence[int], new: int) -> None:
    """Raises UserError for a prompt that cannot be continued by so many tokens."""
    if not ensemble.model.causal:
        raise UserError("these experts are encoders, which continue no text; use fill")
    check_ids(np.asarray(ids), ensemble.model)
    limit = ensemble.longest
    if len(ids) + new > limit:
        # The token that starts texts is ours, not the user's.
        given = len(ids) - ensemble.tokenizer.starts(ids)
        raise UserError(
            f"the prompt has {given} tokens, which leaves this model of {limit} room for "
            f"{max(0, limit - len(ids))} new ones; got max_new_tokens={new}"
        )
