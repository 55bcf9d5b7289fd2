"""What is made of a request before it is submitted: its fields, and of each prompt the ids, the
language and what the answer repeats.

All of this takes time that grows with the request, so the server calls it in a worker thread and
never in its event loop, where health checks and other streams would wait for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from clustering.errors import UserError
from clustering.languages import canonical
from xelm.data.chat_template import template_options
from xelm.data.tokenizer import Tokenizer
from xelm.inference.generation import check_prompt
from xelm.inference.sampling_params import SamplingParams
from xelm.serving.errors import Refused
from xelm.serving.limits import MOST_LOG_PROBABILITIES, Limits
from xelm.serving.offer import Offer
from xelm.serving.requests import ChatRequest, CompletionRequest, wrong


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedText:
    """One prompt of a request."""

    ids: Sequence[int]
    """Of the prompt, as the models read it."""
    user_mask: Sequence[bool] | None
    """By which ids the router goes, as in `Ticket`."""
    language: str | None
    """The language that the request tells, or the detected one; None where there is no text."""
    echo: str = ""
    """What the answer begins with."""
    start: int = 0
    """Tokens of the prompt before those of `echo`: the one that starts every text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRequest:
    """A request whose fields mean something and whose prompts the models can read."""

    texts: Sequence[PreparedText]
    """One for each prompt, each of which is continued `n` times."""
    sampling: SamplingParams
    """How all of them are continued."""
    language: str | None
    """The language that the request tells, as a canonical tag."""


def parsed(
    kind: type[CompletionRequest] | type[ChatRequest], body: bytes
) -> CompletionRequest | ChatRequest:
    """The request of a body of JSON. Raises Refused for the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise Refused(400, *wrong(error)) from None


def prepare(
    asked: CompletionRequest | ChatRequest, offer: Offer, limits: Limits
) -> PreparedRequest:
    """A request in the ids of these models. Raises UserError or Refused for one that cannot be
    answered by them, or that asks for more than the limits allow."""
    prompts, masks = _encoded(asked, offer)
    _check_places(len(prompts) * (asked.n or 1), limits)
    for ids in prompts:
        check_prompt(offer.ensemble, ids, 1 if asked.most_tokens is None else asked.most_tokens)
    sampling = asked.sampling(
        offer.ensemble.sampling,
        offer.ensemble.longest - max(map(len, prompts)),
        limits.tokens,
    )
    if sampling.max_new_tokens > limits.tokens:
        raise Refused(
            400,
            f"max_tokens must be at most {limits.tokens} here; got {sampling.max_new_tokens}",
            "max_tokens",
        )
    _check_log_probabilities(asked, prompts, sampling)
    language = _told(asked.language)
    texts = [
        PreparedText(
            ids=ids,
            user_mask=mask,
            language=language or offer.language_of(ids, mask),
            **_echo(asked, place, ids, offer.ensemble.tokenizer),
        )
        for place, (ids, mask) in enumerate(zip(prompts, masks))
    ]
    return PreparedRequest(texts=texts, sampling=sampling, language=language)


def _encoded(
    asked: CompletionRequest | ChatRequest, offer: Offer
) -> tuple[list[list[int]], list[list[bool] | None]]:
    """Ids of each prompt: of a text after the one that starts texts, and ids as they are. And the
    mask of the ids by which the router goes: in a chat what the user says; None: all."""
    tokenizer = offer.ensemble.tokenizer
    texts = [prompt for prompt in getattr(asked, "prompts", ()) if isinstance(prompt, str)]
    texts += [message.text for message in getattr(asked, "messages", ())]
    if max(map(len, texts), default=0) > offer.most_characters:
        raise UserError(
            f"a prompt of {max(map(len, texts)):,} characters is longer than these models of "
            f"{offer.ensemble.longest} tokens can read"
        )
    if isinstance(asked, ChatRequest):
        if not tokenizer.hub.chat_template:
            raise UserError("the seed has no chat template; use /v1/completions")
        messages = [{"role": m.role, "content": m.text} for m in asked.messages]
        ids, mask = tokenizer.chat_with_user_mask(messages, _options(asked, tokenizer))
        return [ids], [mask]
    prompts = [
        tokenizer.begin(prompt) if isinstance(prompt, str) else prompt for prompt in asked.prompts
    ]
    return prompts, [None] * len(prompts)


def _options(asked: ChatRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    """Values for a chat template. Raises Refused for one that it does not use."""
    used = template_options(tokenizer.hub) if asked.template_options else ()
    for name, (param, _) in asked.template_options.items():
        if name not in used:
            message = f"{param}: the seed's chat template does not use {name!r:.80}; leave it out"
            raise Refused(400, message, param)
    return {name: value for name, (_, value) in asked.template_options.items()}


def _told(language: str | None) -> str | None:
    """The language that a request names, as a canonical tag. Raises Refused for what is none."""
    try:
        return None if language is None else canonical(language)
    except UserError as error:
        raise Refused(400, str(error), "language") from None


def _echo(
    asked: CompletionRequest | ChatRequest, place: int, ids: Sequence[int], tokenizer: Tokenizer
) -> dict[str, Any]:
    """What the answer repeats of a prompt: all that was given, and nothing put before it."""
    if not isinstance(asked, CompletionRequest) or not asked.echoes:
        return {}
    prompt = asked.prompts[place]
    given = tokenizer.encode([prompt])[0] if isinstance(prompt, str) else prompt
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    return {"echo": text, "start": len(ids) - len(given)}


def _check_places(texts: int, limits: Limits) -> None:
    """Raises Refused for a request of more texts than there are places."""
    places = limits.texts + limits.waiting
    if texts > places:
        raise Refused(400, f"a request may have {places} texts here, prompts times n; got {texts}")


def _check_log_probabilities(
    asked: CompletionRequest | ChatRequest,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
) -> None:
    """Raises Refused for a request of which more log probabilities are wanted than may be."""
    if asked.alternatives is None:
        return
    drawn = 0 if asked.most_tokens == 0 else sampling.max_new_tokens
    scored = [len(ids) if asked.scores_prompt else 0 for ids in prompts]
    wanted = sum(count + drawn for count in scored) * (asked.alternatives + 1) * (asked.n or 1)
    if wanted > MOST_LOG_PROBABILITIES:
        raise Refused(
            400,
            f"a request may ask for {MOST_LOG_PROBABILITIES:,} log probabilities: tokens times "
            f"alternatives and one; got {wanted:,}",
            "logprobs",
        )
