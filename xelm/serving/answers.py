"""Bodies of answers, in the shape of OpenAI's interfaces.

Beyond that shape every choice has `xelm`: the language of the text and how much each expert spoke.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from xelm.serving.desk import Ended


class Answer:
    """Bodies of the answers to one request."""

    def __init__(self, model: str, *, chat: bool):
        self._chat, self._model = chat, model
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(
        self, texts: Sequence[str], ends: Sequence[Ended], about: Sequence[Any], prompt_tokens: int
    ) -> dict[str, Any]:
        """All of it. about: the `xelm` of each choice."""
        choices = []
        for index, (text, end, xelm) in enumerate(zip(texts, ends, about)):
            said: dict[str, Any] = {"text": text}
            if self._chat:
                said = {"message": {"role": "assistant", "content": text}}
            choice = {"index": index, **said, "logprobs": None, "finish_reason": end.reason}
            choices.append({**choice, "xelm": xelm})
        usage = usage_of(prompt_tokens, sum(end.tokens for end in ends))
        kind = "chat.completion" if self._chat else "text_completion"
        return self._body(kind, choices=choices, usage=usage)

    def part(
        self,
        index: int,
        text: str,
        about: Mapping[str, Any] | None,
        *,
        reason: str | None = None,
        first: bool = False,
    ) -> dict[str, Any]:
        """A piece of a stream."""
        said: dict[str, Any] = {"text": text}
        if self._chat:
            said = {"delta": {"role": "assistant", "content": ""} if first else {}}
            if text:
                said["delta"]["content"] = text
        choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
        if about is not None:
            choice["xelm"] = about
        return self._body(self._part_kind, choices=[choice])

    def last(self, prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """The piece that counts, at the end of a stream."""
        usage = usage_of(prompt_tokens, tokens)
        return self._body(self._part_kind, choices=[], usage=usage)

    @property
    def _part_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _body(self, kind: str, **more: Any) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return {**head, **more}


def usage_of(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """What was read and drawn."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }
