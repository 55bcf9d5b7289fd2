"""Bodies of responses, in the shape of OpenAI's interfaces.

Beyond that shape every choice has `xelm`: the language of the prompt and where it is known from,
the router that decided, and the weight of each model.
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
from xelm.serving.batch import Finished

_MINUS_INFINITY = -9999.0
"""Log probability in place of minus infinity, which JSON does not have; the same as OpenAI's."""


class TokenNames:
    """Names of tokens: their text, or their name in the vocabulary for a token that is a byte or a
    part of a character."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.hub.all_special_ids)
        """Tokens that have names and no text."""
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def __call__(self, token: int) -> tuple[str, list[int] | None]:
        """The name of a token and its bytes in UTF-8; None where they are not known."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def _find(self, token: int) -> tuple[str, list[int] | None]:
        entry = self.tokenizer.hub.convert_ids_to_tokens(token)
        if entry is None:  # a row of the embedding that is in no vocabulary
            return f"<{token}>", None
        if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", entry):
            return entry, [int(byte[1], 16)]
        text = self.tokenizer.piece(token)
        return (entry, None) if "\ufffd" in text else (text, list(text.encode()))


@dataclass(kw_only=True)
class Choice:
    """Text of one choice, as far as it is generated."""

    text: str = ""
    likelihoods: list[TokenLikelihood] = field(default_factory=list)
    """Its tokens, where their log probabilities are wanted."""


class ResponseBodies:
    """Makes the bodies of the response to one request."""

    def __init__(self, model: str, names: TokenNames, *, chat: bool, likelihoods: bool):
        """likelihoods: whether log probabilities are wanted."""
        self._chat, self._model, self._names, self._likelihoods = chat, model, names, likelihoods
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._lengths: Counter[int] = Counter()
        """Index of a choice -> number of characters of its tokens so far."""

    def full(
        self,
        choices: Sequence[Choice],
        ends: Sequence[Finished],
        xelm: Sequence[Mapping[str, Any]],
        prompt_tokens: int,
    ) -> dict[str, Any]:
        """The body of a response that is not streamed. xelm: that field of each choice.
        prompt_tokens: number of tokens of all prompts."""
        bodies = []
        for index, (choice, end) in enumerate(zip(choices, ends)):
            body: dict[str, Any] = {"text": choice.text}
            if self._chat:
                body = {"message": {"role": "assistant", "content": choice.text}}
            logprobs = self._logprobs(index, choice.likelihoods, choice.text)
            body |= {"logprobs": logprobs, "finish_reason": end.reason, "xelm": xelm[index]}
            bodies.append({"index": index, **body})
        usage = _usage(prompt_tokens, sum(end.tokens for end in ends))
        kind = "chat.completion" if self._chat else "text_completion"
        return self._body(kind, choices=bodies, usage=usage)

    def chunk(
        self,
        index: int,
        text: str,
        xelm: Mapping[str, Any] | None,
        *,
        likelihoods: Sequence[TokenLikelihood] = (),
        reason: str | None = None,
        first: bool = False,
    ) -> dict[str, Any]:
        """The body of one chunk of a stream."""
        body: dict[str, Any] = {"text": text}
        if self._chat:
            body = {"delta": {"role": "assistant", "content": ""} if first else {}}
            if text:
                body["delta"]["content"] = text
        logprobs = self._logprobs(index, likelihoods, text) if likelihoods else None
        choice = {"index": index, **body, "logprobs": logprobs, "finish_reason": reason}
        if xelm is not None:
            choice["xelm"] = xelm
        return self._body(self._chunk_kind, choices=[choice])

    def usage_chunk(self, prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """The body of the last chunk of a stream, which counts tokens."""
        usage = _usage(prompt_tokens, tokens)
        return self._body(self._chunk_kind, choices=[], usage=usage)

    def _logprobs(
        self, index: int, tokens: Sequence[TokenLikelihood], text: str
    ) -> dict[str, Any] | None:
        """Log probabilities of a choice's next tokens, which make this text; None where they are
        not wanted."""
        if not self._likelihoods:
            return None
        if self._chat:
            return {"content": [self._chat_logprob(token) for token in tokens], "refusal": None}
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        offsets = []
        for token in tokens:
            name = self._names(token.token)[0]
            if index not in self._lengths and name.startswith(" ") and not text.startswith(" "):
                self._lengths[index] = -1  # the space before a first word is not in the text
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

    def _chat_logprob(self, token: TokenLikelihood) -> dict[str, Any]:
        def entry(token: int, value: float) -> dict[str, Any]:
            name, utf8 = self._names(token)
            return {"token": name, "logprob": _finite(value), "bytes": utf8}

        own = entry(token.token, token.log_probability)
        return {**own, "top_logprobs": [entry(other, value) for other, value in token.top]}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _body(self, kind: str, **more: Any) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return {**head, **more}


def _finite(value: float) -> float | None:
    """A log probability for JSON; None for NaN, that of a token that follows nothing."""
    return None if value != value else max(value, _MINUS_INFINITY)


def _usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }
