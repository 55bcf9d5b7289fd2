"""Text of a sequence that is being generated: ids become pieces of text that are final."""

from collections.abc import Sequence

from xelm.data.tokenizer import Tokenizer
from xelm.data.unicode import composed_and_decomposed

# Enough ids before a continuation for the tokenizer to see that it stands within a text.
IDS_BEFORE = 8
# More ids than one character has; pending ids are decoded again with each new one.
IDS_PENDING = 16


class Detokenizer:
    """Decodes a continuation id by id, up to a stop string, and returns each part of the text once,
    when nothing that follows can change it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
        """prompt: ids that the continuation follows. stop: strings before which it ends."""
        self.ids: list[int] = []
        """All ids of the continuation."""
        self.text = ""
        """Its text so far, up to a stop string."""
        self.stopped = False
        """Whether a stop string was found."""
        # A model may write a character composed or decomposed, whatever the stop string has.
        self._stop = [form for text in stop for form in composed_and_decomposed(text)]
        self._tokenizer = tokenizer
        # Ids are decoded behind others: a leading space would be lost alone.
        self._before = _whole_characters(tokenizer, list(prompt)) or list(prompt)
        self._skipped = len(tokenizer.decode(self._before))
        self._settled, self._pending = "", []
        self._returned = ""

    def add(self, token: int) -> str:
        """Adds an id; returns the text that is final now and was not returned before."""
        self.ids.append(token)
        self._pending.append(token)
        text = (
            self._settled + self._tokenizer.decode([*self._before, *self._pending])[self._skipped :]
        )
        # Text that was returned stays, even if further bytes make another character of it.
        text = self._returned + text[len(self._returned) :]
        # No stop string begins in text that was returned.
        ends = [at for stop in self._stop if (at := text.find(stop, len(self._returned))) >= 0]
        if ends:
            self.stopped = True
            self.text = text[: min(ends)]
            return self.rest()
        self.text = text
        # The last character may lack bytes, and the end may be the beginning of a stop string.
        whole = text.rstrip("\ufffd")
        final = len(whole)
        for stop in self._stop:
            for size in range(1, min(len(stop), len(whole) + 1)):
                if whole.endswith(stop[:size]):
                    final = min(final, len(whole) - size)
        # Soon where no text is held back; where a stop string may have begun, not for ever.
        most = IDS_PENDING if final == len(text) else 4 * IDS_PENDING
        if len(self._pending) >= most and whole == text:
            self._settle(text)
        return self._return(final)

    def rest(self) -> str:
        """The text that was not returned yet, without a last character that lacks bytes."""
        final = len(self.text.rstrip("\ufffd"))
        self.text = self.text[: max(final, len(self._returned))]
        return self._return(len(self.text))

    def _settle(self, text: str) -> None:
        """Marks all ids so far as decoded: further ids are decoded behind the last of them."""
        before = _whole_characters(self._tokenizer, [*self._before, *self._pending])
        if before is not None:
            self._before, self._skipped = before, len(self._tokenizer.decode(before))
            self._settled, self._pending = text, []

    def _return(self, end: int) -> str:
        piece = self.text[len(self._returned) : end]
        self._returned += piece
        return piece


def _whole_characters(tokenizer: Tokenizer, ids: list[int]) -> list[int] | None:
    """The last few ids, from where a character (of four bytes at most) begins; None: nowhere."""
    for size in range(IDS_BEFORE, IDS_BEFORE + 4):
        if "\ufffd" not in tokenizer.decode(ids[-size:]):
            return ids[-size:]
    return None
