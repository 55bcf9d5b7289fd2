"""Bodies of responses, in the shape of OpenAI's interfaces.

Beyond that shape every choice has `xelm`: the language of the prompt and where it is known from,
the router that decided, and the weight of each model.
"""

import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response

from xelm.data.tokenizer import Tokenizer
from xelm.inference.sampling import TokenLikelihood
from xelm.serving.batch import Finished, PromptScored, TextDelta
from xelm.serving.openai_prompts import TokenizedPrompt
from xelm.serving.openai_requests import Body, ChatRequest

Progress = PromptScored | TextDelta | Finished
"""Events that a response is made of."""

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
    """One choice of a response: a prompt, and its continuation as far as it is generated."""

    index: int
    prompt: TokenizedPrompt
    text: str
    """Begins with the prompt's echo."""
    likelihoods: list[TokenLikelihood] = field(default_factory=list)
    """Tokens of the text, where their log probabilities are wanted."""
    end: Finished | None = None
    """The last event, when it has come."""

    def tokens_of(self, event: Progress) -> Sequence[TokenLikelihood]:
        """The tokens of an event that are in the response."""
        start = self.prompt.echo_start if isinstance(event, PromptScored) else 0
        return event.likelihoods[start:]


class ResponseBodies:
    """The response to one request: its JSON body, or the chunks of its stream."""

    def __init__(self, request: Body, names: Callable[[Tokenizer], TokenNames], prompt_tokens: int):
        """names: returns the names of a tokenizer's tokens. prompt_tokens: number of tokens of all
        prompts."""
        self._request, self._names, self._prompt_tokens = request, names, prompt_tokens
        self._chat = isinstance(request, ChatRequest)
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._lengths: Counter[int] = Counter()
        """Index of a choice -> number of characters of its tokens so far."""

    def full(self, choices: Sequence[Choice]) -> Response:
        """The response that is not streamed, when all choices are finished."""
        bodies = []
        for choice in choices:
            assert choice.end is not None
            body: dict[str, Any] = {"text": choice.text}
            if self._chat:
                body = {"message": {"role": "assistant", "content": choice.text}}
            logprobs = self._logprobs(choice, choice.likelihoods, choice.text)
            body |= {"logprobs": logprobs, "finish_reason": choice.end.reason}
            bodies.append({"index": choice.index, **body, "xelm": self._xelm(choice, choice.end)})
        kind = "chat.completion" if self._chat else "text_completion"
        return JSONResponse(self._body(kind, choices=bodies, usage=self._usage(choices)))

    def first_chunks(self, choices: Sequence[Choice]) -> list[str]:
        """The chunks of a stream before any event: the role in a chat, or an unscored echo."""
        bodies: dict[int, dict[str, Any]] = {}
        for choice in choices:
            if self._chat:
                bodies[choice.index] = {"delta": {"role": "assistant", "content": ""}}
            elif choice.prompt.echo and not self._request.scores_prompt:
                bodies[choice.index] = {"text": choice.prompt.echo}
        rest = {"logprobs": None, "finish_reason": None}
        return [self._chunk({"index": index, **body, **rest}) for index, body in bodies.items()]

    def chunk(self, choice: Choice, event: Progress) -> str:
        """The chunk of a stream for an event."""
        text = event.text if isinstance(event, TextDelta) else ""
        if isinstance(event, PromptScored):
            text = choice.prompt.echo
        body: dict[str, Any] = {"text": text}
        if self._chat:
            body = {"delta": {"content": text} if text else {}}
        tokens = choice.tokens_of(event)
        body["logprobs"] = self._logprobs(choice, tokens, text) if tokens else None
        body["finish_reason"] = event.reason if isinstance(event, Finished) else None
        if not isinstance(event, PromptScored):
            body["xelm"] = self._xelm(choice, event)
        return self._chunk({"index": choice.index, **body})

    def usage_chunk(self, choices: Sequence[Choice]) -> str:
        """The last chunk of a stream, which counts tokens."""
        return self._chunk(usage=self._usage(choices))

    def _chunk(self, *choices: Mapping[str, Any], **more: Any) -> str:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return server_sent(self._body(kind, choices=choices, **more))

    def _xelm(self, choice: Choice, event: TextDelta | Finished) -> dict[str, Any]:
        """The field `xelm` of a choice; router and weights are null where no token was routed."""
        language = choice.prompt.language
        source = "detector" if self._request.language is None else "request"
        return {
            "language": language,
            "language_from": None if language is None else source,
            "router": event.router or None,
            "weights": event.weights if event.router else None,
        }

    def _logprobs(
        self, choice: Choice, tokens: Sequence[TokenLikelihood], text: str
    ) -> dict[str, Any] | None:
        """Log probabilities of a choice's next tokens, which make this text; None if not wanted."""
        if self._request.alternatives is None:
            return None
        index, names = choice.index, self._names(choice.prompt.pool.tokenizer)
        if self._chat:
            content = [_chat_logprob(token, names) for token in tokens]
            return {"content": content, "refusal": None}
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        offsets = []
        for token in tokens:
            name = names(token.token)[0]
            if index not in self._lengths and name.startswith(" ") and not text.startswith(" "):
                self._lengths[index] = -1  # the space before a first word is not in the text
            offsets.append(max(0, self._lengths[index]))
            self._lengths[index] += 0 if token.token in names.special else len(name)
            own = _finite(token.log_probability)
            top = {name: own}
            for other, value in token.top:
                top.setdefault(names(other)[0], _finite(value))
            found["tokens"].append(name)
            found["token_logprobs"].append(own)
            found["top_logprobs"].append(None if own is None else top)
        return {**found, "text_offset": offsets}

    def _body(self, kind: str, **more: Any) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._created}
        return {**head, "model": self._request.model, **more}

    def _usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        prompts, new = self._prompt_tokens, sum(each.end.tokens for each in choices if each.end)
        return {"prompt_tokens": prompts, "completion_tokens": new, "total_tokens": prompts + new}


def _chat_logprob(token: TokenLikelihood, names: TokenNames) -> dict[str, Any]:
    def entry(token: int, value: float) -> dict[str, Any]:
        name, utf8 = names(token)
        return {"token": name, "logprob": _finite(value), "bytes": utf8}

    own = entry(token.token, token.log_probability)
    return {**own, "top_logprobs": [entry(other, value) for other, value in token.top]}


def server_sent(body: Any) -> str:
    """A server-sent event with a JSON body."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _finite(value: float) -> float | None:
    """A log probability for JSON; None for NaN, that of a token that follows nothing."""
    return None if value != value else max(value, _MINUS_INFINITY)
