"""What requests may say, in the words of OpenAI's interfaces, and what they are answered.

Beyond those words requests may have `language`, `top_k` and `repetition_penalty`, and every choice
of an answer has `xelm`: the language of the text and how much each expert spoke.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from xelm.inference.sampling import Sampling
from xelm.serving.desk import Ended

MOST_STOPS, MOST_CHOICES, MOST_PROMPTS = 4, 16, 64
MOST_IDS, MOST_MESSAGES, LONGEST_STOP = 2**17, 4096, 256

_Number = Annotated[float, Field(allow_inf_nan=False)]
# All lists fail at their first fault: of a million there would be a million.
_Ids = Annotated[
    list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MOST_IDS, fail_fast=True)
]
_Stop = Annotated[str, Field(max_length=LONGEST_STOP)]


class StreamOptions(BaseModel):
    """Of a stream."""

    include_usage: bool | None = None


class ResponseFormat(BaseModel):
    """Of what kind the text is to be."""

    type: Literal["text"]


class _Request(BaseModel):
    # What is unknown may be of a newer client; what is known and not done here is refused below.
    model_config = ConfigDict(extra="ignore")

    model: str
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: _Number | None = None
    top_p: _Number | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    repetition_penalty: _Number | None = None
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    language: str | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    response_format: ResponseFormat | None = None
    min_tokens: Literal[0] | None = None
    min_p: Literal[0] | None = None
    ignore_eos: Literal[False] | None = None

    @property
    def most_tokens(self) -> int | None:
        """That may be drawn."""
        return self.max_tokens

    @property
    def usage_wanted(self) -> bool:
        """At the end of a stream."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, base: Sampling, room: int, most: int) -> Sampling:
        """As the request asks, on top of `base`. room: tokens by which the longest of its texts can
        grow. most: that the server draws at most. UserError for values that mean nothing."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            # -1 and 0 are common for "all".
            "top_k": None if self.top_k is not None and self.top_k < 1 else self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "stop": None if stop is None else tuple(stop),
            "max_new_tokens": self.most_tokens,
            "random_seed": secrets.randbits(31) if self.seed is None else self.seed % 2**31,
        }
        given = {name: value for name, value in given.items() if value is not None}
        given.setdefault("max_new_tokens", max(1, min(base.max_new_tokens, room, most)))
        return replace(base, **given)


class CompletionRequest(_Request):
    """Of /v1/completions."""

    prompt: (
        str
        | _Ids
        | Annotated[list[str | _Ids], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    )
    echo: Literal[False] | None = None
    logprobs: Literal[0] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more, as text or ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class Part(BaseModel):
    """Of the content of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """Of a chat."""

    role: str
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None

    @field_validator("role")
    @classmethod
    def _known(cls, role: str) -> str:
        if role not in ("system", "developer", "user", "assistant"):
            raise ValueError(f"roles are system, user and assistant; got {role!r}")
        return "system" if role == "developer" else role

    @property
    def text(self) -> str:
        """All of its content."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(_Request):
    """Of /v1/chat/completions."""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


_WANTED = {
    "prompt": f"a text, a list of ids, or at most {MOST_PROMPTS} of these",
    "stop": f"a text or at most {MOST_STOPS}, of at most {LONGEST_STOP} characters",
    "messages": "a list of messages with a role and a content of text",
}
"""Fields that may be of several kinds, of each of which pydantic would say why it is not."""


def wrong(error: ValidationError) -> tuple[str, str | None]:
    """What is wrong with a request, in a line, and the name of the part."""
    first = error.errors(include_url=False, include_context=False)[0]
    if not first["loc"]:
        return first["msg"], None
    field = str(first["loc"][0])
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return f"{field} is missing", field
    if first["type"] == "value_error" or field not in _WANTED:
        what = first["msg"].removeprefix("Value error, ")
    else:
        what = f"wanted {_WANTED[field]}"
    return f"{field}: {what}; got {first['input']!r:.60}", field


def problem(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The body of an answer that is none."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    codes = {401: "invalid_api_key", 404: "model_not_found", 429: "queue_full"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = codes.get(status)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


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
