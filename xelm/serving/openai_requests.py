"""Bodies of requests, in the shape of OpenAI's interfaces.

Every field is either supported or refused by its name: none that would change the response is
ignored. Some of OpenAI's fields do not concern the response (`IGNORED`). Beyond OpenAI's, requests
may have `language`, `top_k`, `repetition_penalty` and, in chats, `chat_template_kwargs`.
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
"""Fields that are accepted and change nothing: they concern accounts, bills and records."""


def _only(*neutral: Any) -> AfterValidator:
    """Validator of a field that is accepted only where its value changes nothing."""

    def check(value: Any) -> Any:
        if not any(value == one and type(value) is type(one) for one in neutral):
            raise ValueError(f"is not supported; leave it out or give {neutral[0]!r}")
        return value

    return AfterValidator(check)


_Number = Annotated[float, Field(allow_inf_nan=False)]
# All lists fail at their first fault: of a million there would be a million.
_Ids = Annotated[
    list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MOST_IDS, fail_fast=True)
]
_Stop = Annotated[str, Field(max_length=LONGEST_STOP)]


class _Strict(BaseModel):
    """Base of all bodies: refuses unknown fields, and values of another JSON type than the field's
    (true is not a number, but a float may be an integer). A field with null counts as left out."""

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
    """Format of the text that is generated."""

    type: Literal["text"]


class _Request(_Strict):
    """Fields and properties of both kinds of requests."""

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
        """Largest number of tokens to generate for each sequence."""
        return self.max_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether log probabilities of the prompt's tokens are wanted."""
        return False

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, default: SamplingParams, most: int) -> SamplingParams:
        """Sampling parameters of the request, otherwise those of `default`, with at most `most` new
        tokens where the request does not say how many. UserError for values out of range."""
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
        given.setdefault("max_new_tokens", max(1, min(default.max_new_tokens, most)))
        return replace(default, **given)


class CompletionRequest(_Request):
    """Body of a request to /v1/completions."""

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
        """All prompts, each as text or ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def alternatives(self) -> int | None:
        """Number of likeliest tokens to name with each token's log probability; None: no log
        probabilities are wanted."""
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        return bool(self.echo) and self.logprobs is not None

    @property
    def texts(self) -> list[str]:
        """All text that is to be tokenised."""
        return [prompt for prompt in self.prompts if isinstance(prompt, str)]


class Part(_Strict):
    """Part of the content of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """Message of a chat."""

    role: str
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    # Clients send earlier responses back as they came, with their empty fields.
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
        """The whole content as text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(_Request):
    """Body of a request to /v1/chat/completions."""

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
    # Any value is right: without tools it means nothing.
    parallel_tool_calls: Annotated[Any, _only(True, False)] = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """Number of likeliest tokens to name, as for completions."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def texts(self) -> list[str]:
        """All text that is to be tokenised."""
        return [message.text for message in self.messages]

    @property
    def template_options(self) -> dict[str, tuple[str, Any]]:
        """Values for the chat template: name -> field of the request, and value."""
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


Body = CompletionRequest | ChatRequest

_WANTED = {
    "prompt": f"a text, a list of ids, or at most {MOST_PROMPTS} of these",
    "stop": f"a text or at most {MOST_STOPS}, of at most {LONGEST_STOP} characters",
    "messages": "a list of messages with a role and a content of text",
}
"""Fields of several types; pydantic would say for each type why the value is not of it."""


def fault(error: ValidationError) -> tuple[str, str | None]:
    """The first fault of a request as one line, and the name of its field."""
    first = error.errors(include_url=False, include_context=False)[0]
    if not first["loc"]:
        return first["msg"], None
    field = str(first["loc"][0])
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return f"{field} is missing", field
    if first["type"] == "extra_forbidden":
        name = ".".join(str(part) for part in first["loc"])
        return f"{name:.80} is not supported; leave it out", f"{name:.80}"
    if first["type"] == "value_error":
        what = first["msg"].removeprefix("Value error, ")
        if what.startswith("is not supported"):
            return f"{field} {what}; got {first['input']!r:.60}", field
    elif field not in _WANTED:
        what = first["msg"]
    else:
        what = f"wanted {_WANTED[field]}"
    return f"{field}: {what}; got {first['input']!r:.60}", field
