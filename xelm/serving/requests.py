"""Fields of requests, in the words of OpenAI's interfaces.

Every field is either done, or refused by its name: nothing that would change the answer is ignored.
Some fields of OpenAI's say nothing about the answer (`IGNORED`). Beyond OpenAI's, requests may have
`language`, `top_k`, `repetition_penalty` and, in chats, `chat_template_kwargs`.
"""

import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from xelm.inference.sampling_params import SamplingParams

MOST_STOPS, MOST_CHOICES, MOST_PROMPTS, MOST_ALTERNATIVES = 16, 16, 64, 20
MOST_IDS, MOST_MESSAGES, LONGEST_STOP = 2**17, 4096, 256
IGNORED = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
"""Fields that are accepted and change nothing: they are about accounts, bills and records, of which
there are none here."""


def _only(*neutral: Any) -> AfterValidator:
    """A field that is accepted where its value asks for what is done anyway."""

    def check(value: Any) -> Any:
        if not any(value == one and type(value) is type(one) for one in neutral):
            raise ValueError(f"is not done here; leave it out or give {neutral[0]!r}")
        return value

    return AfterValidator(check)


_Number = Annotated[float, Field(allow_inf_nan=False)]
# All lists fail at their first fault: of a million there would be a million.
_Ids = Annotated[
    list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MOST_IDS, fail_fast=True)
]
_Stop = Annotated[str, Field(max_length=LONGEST_STOP)]


class _Strict(BaseModel):
    """Fields that are not known are refused, and so is a value of another JSON type than the
    field's: true is no number. A float may be an integer. null is what clients send for fields not
    given."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return {name: value for name, value in given.items() if value is not None}
        return given


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, _only(False)] = None


class ResponseFormat(_Strict):
    """The kind of text that is wanted."""

    type: Literal["text"]


class _Request(_Strict):
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
    presence_penalty: Annotated[Any, _only(0, 0.0)] = None
    frequency_penalty: Annotated[Any, _only(0, 0.0)] = None
    logit_bias: Annotated[Any, _only({})] = None
    response_format: ResponseFormat | None = None
    min_tokens: Annotated[Any, _only(0)] = None
    min_p: Annotated[Any, _only(0, 0.0)] = None
    ignore_eos: Annotated[Any, _only(False)] = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    service_tier: Any = None

    @property
    def most_tokens(self) -> int | None:
        """Tokens that may be drawn for each text."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Likeliest tokens to be named with the log probability of each token; None: no log
        probabilities are wanted."""
        return None

    @property
    def echoes(self) -> bool:
        """Whether the answer begins with the prompt."""
        return False

    @property
    def scores_prompt(self) -> bool:
        """Whether the log probabilities of the prompt's tokens are wanted."""
        return self.echoes and self.alternatives is not None

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, base: SamplingParams, room: int, most: int) -> SamplingParams:
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
            "max_new_tokens": None if self.most_tokens is None else max(1, self.most_tokens),
            "random_seed": secrets.randbits(31) if self.seed is None else self.seed % 2**31,
        }
        given = {name: value for name, value in given.items() if value is not None}
        given.setdefault("max_new_tokens", max(1, min(base.max_new_tokens, room, most)))
        return replace(base, **given)


class CompletionRequest(_Request):
    """A request to /v1/completions."""

    prompt: (
        str
        | _Ids
        | Annotated[list[str | _Ids], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    suffix: Annotated[Any, _only("")] = None
    best_of: Annotated[Any, _only(1)] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more, as text or ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return bool(self.echo)


class Part(_Strict):
    """A part of the content of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of a chat."""

    role: str
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    # Clients send answers back as they came, with what is empty in them.
    annotations: Annotated[Any, _only([])] = None
    tool_calls: Annotated[Any, _only([])] = None

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
    """A request to /v1/chat/completions."""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    modalities: Annotated[Any, _only(["text"])] = None
    verbosity: Annotated[Any, _only("medium")] = None
    tools: Annotated[Any, _only([])] = None
    functions: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    # Means nothing without tools.
    parallel_tool_calls: Annotated[Any, _only(True, False)] = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def template_options(self) -> dict[str, tuple[str, Any]]:
        """Values for the chat template: name -> the field of the request, and the value."""
        given = self.chat_template_kwargs or {}
        found = {name: ("chat_template_kwargs", value) for name, value in given.items()}
        if self.reasoning_effort is not None:
            found["reasoning_effort"] = ("reasoning_effort", self.reasoning_effort)
        return found

    @field_validator("top_logprobs")
    @classmethod
    def _wanted(cls, count: int | None, given: ValidationInfo) -> int | None:
        if count and not given.data.get("logprobs"):
            raise ValueError("goes with logprobs=true")
        return count


_WANTED = {
    "prompt": f"a text, a list of ids, or at most {MOST_PROMPTS} of these",
    "stop": f"a text or at most {MOST_STOPS}, of at most {LONGEST_STOP} characters",
    "messages": "a list of messages with a role and a content of text",
}
"""Fields that may be of several kinds, of each of which pydantic would say why it is not."""


def wrong(error: ValidationError) -> tuple[str, str | None]:
    """What is wrong with a request, in a line, and the name of the field."""
    first = error.errors(include_url=False, include_context=False)[0]
    if not first["loc"]:
        return first["msg"], None
    field = str(first["loc"][0])
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return f"{field} is missing", field
    if first["type"] == "extra_forbidden":
        name = ".".join(str(part) for part in first["loc"])
        return f"{name:.80} is not done here; leave it out", f"{name:.80}"
    if first["type"] == "value_error":
        what = first["msg"].removeprefix("Value error, ")
        if what.startswith("is not done here"):
            return f"{field} {what}; got {first['input']!r:.60}", field
    elif field not in _WANTED:
        what = first["msg"]
    else:
        what = f"wanted {_WANTED[field]}"
    return f"{field}: {what}; got {first['input']!r:.60}", field
