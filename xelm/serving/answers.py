"""Bodies of answers, in the shape of OpenAI's interfaces.

Beyond that shape every choice has `xelm`: the language of the text, whether it was told or
detected, the router that decided, and how much each model spoke.
"""

import re
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xelm.data.tokenizer import Tokenizer
from xelm.inference.sampling import TokenLikelihood
from xelm.serving.desk import Ended

_LEAST = -9999.0
"""The log probability that stands for minus infinity, which JSON cannot say, as OpenAI has it."""


class TokenNames:
    """Names of tokens: as they read within a text, and for a token that is a byte or a part of a
    character, its name in the vocabulary."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.hub.all_special_ids)
        """Tokens that have names and are nothing in a text."""
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def __call__(self, token: int) -> tuple[str, list[int] | None]:
        """The name, and the bytes of UTF-8 that the token stands for, where they are known."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def _find(self, token: int) -> tuple[str, list[int] | None]:
        entry = self.tokenizer.hub.convert_ids_to_tokens(token)
        if entry is None:  # a row of the embedding that no text becomes
            return f"<{token}>", None
        if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", entry):
            return entry, [int(byte[1], 16)]
        text = self.tokenizer.piece(token)
        return (entry, None) if "\ufffd" in text else (text, list(text.encode()))


@dataclass(kw_only=True)
class Choice:
    """One of the texts of an answer, as far as it is known."""

    text: str = ""
    likelihoods: list[TokenLikelihood] = field(default_factory=list)
    """Of its tokens, where they are wanted."""


class Answer:
    """Bodies of the answers to one request."""

    def __init__(self, model: str, names: TokenNames, *, chat: bool, likelihoods: bool):
        """likelihoods: whether log probabilities are wanted."""
        self._chat, self._model, self._names, self._wanted = chat, model, names, likelihoods
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._lengths: Counter[int] = Counter()
        """Choice -> characters of its tokens so far."""

    def whole(
        self, said: Sequence[Choice], ends: Sequence[Ended], about: Sequence[Any], prompt: int
    ) -> dict[str, Any]:
        """All of it. about: the `xelm` of each choice. prompt: tokens of all prompts."""
        choices = []
        for index, (one, end, xelm) in enumerate(zip(said, ends, about)):
            body: dict[str, Any] = {"text": one.text}
            if self._chat:
                body = {"message": {"role": "assistant", "content": one.text}}
            logprobs = self._logprobs(index, one.likelihoods, one.text)
            choice = {"index": index, **body, "logprobs": logprobs, "finish_reason": end.reason}
            choices.append({**choice, "xelm": xelm})
        usage = usage_of(prompt, sum(end.tokens for end in ends))
        kind = "chat.completion" if self._chat else "text_completion"
        return self._body(kind, choices=choices, usage=usage)

    def part(
        self,
        index: int,
        text: str,
        about: Mapping[str, Any] | None,
        *,
        likelihoods: Sequence[TokenLikelihood] = (),
        reason: str | None = None,
        first: bool = False,
    ) -> dict[str, Any]:
        """A piece of a stream."""
        said: dict[str, Any] = {"text": text}
        if self._chat:
            said = {"delta": {"role": "assistant", "content": ""} if first else {}}
            if text:
                said["delta"]["content"] = text
        logprobs = self._logprobs(index, likelihoods, text) if likelihoods else None
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
        if about is not None:
            choice["xelm"] = about
        return self._body(self._part_kind, choices=[choice])

    def _logprobs(
        self, index: int, tokens: Sequence[TokenLikelihood], text: str
    ) -> dict[str, Any] | None:
        """Log probabilities of a choice's next tokens, which are those of this text; None where
        they are not wanted."""
        if not self._wanted:
            return None
        if self._chat:
            return {"content": [self._of_chat(token) for token in tokens], "refusal": None}
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        offsets = []
        for token in tokens:
            name = self._names(token.token)[0]
            if index not in self._lengths and name.startswith(" ") and not text.startswith(" "):
                self._lengths[index] = -1  # the space before a first word is no part of a text
            offsets.append(max(0, self._lengths[index]))
            self._lengths[index] += 0 if token.token in self._names.special else len(name)
            own = _finite(token.log_probability)
            top = {name: own}
            for other, value in token.top:
                top.setdefault(self._names(other)[0], _finite(value))
            found["tokens"].append(name)
            found["token_logprobs"].append(own)
            found["top_logprobs"].append(None if own is None else top)
        return {**found, "text_offset": offsets}

    def _of_chat(self, token: TokenLikelihood) -> dict[str, Any]:
        def entry(token: int, value: float) -> dict[str, Any]:
            name, utf8 = self._names(token)
            return {"token": name, "logprob": _finite(value), "bytes": utf8}

        own = entry(token.token, token.log_probability)
        return {**own, "top_logprobs": [entry(other, value) for other, value in token.top]}

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


def _finite(value: float) -> float | None:
    """A log probability as JSON can have it; None for that of a token that follows nothing."""
    return None if value != value else max(value, _LEAST)


def usage_of(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """What was read and drawn."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }
