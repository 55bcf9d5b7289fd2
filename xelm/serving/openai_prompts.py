"""Prompts of a request as token ids, with the language and the text that the response repeats.

All of this takes time that grows with the request, so the server calls it in a worker thread and
never in its event loop, where health checks and other streams would wait for it.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from clustering.errors import UserError
from clustering.languages import canonical
from xelm.data.chat_template import template_options
from xelm.data.tokenizer import Tokenizer
from xelm.inference.ensemble import Ensemble
from xelm.inference.generation import check_prompt
from xelm.inference.piecewise import PiecewiseScorer
from xelm.inference.sampling_params import SamplingParams
from xelm.inference.vocabularies import Choice
from xelm.inference.work import Work, finish
from xelm.serving.errors import Refused
from xelm.serving.limits import MOST_LOG_PROBABILITIES, Limits
from xelm.serving.models import ENSEMBLE, ServedModels
from xelm.serving.openai_requests import Body, ChatRequest, CompletionRequest, fault

Read = Callable[[PiecewiseScorer], Work[list[Ensemble]]]
"""A computation in which models read prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Prompts that models have to read before it is known in which vocabulary each is read."""

    begin: Read
    """Begins to read them; returns the pool of each prompt."""
    tokens: int
    """Number of their tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedPrompt:
    """One prompt of a request."""

    ids: Sequence[int]
    """Token ids, as the models read them."""
    user_mask: Sequence[bool] | None
    """Whether the router goes by each id, as in `batch.Request`."""
    pool: Ensemble
    """The pool that reads it, in whose vocabulary it is."""
    language: str | None
    """Language that the request states, otherwise the detected one; None where there is no text."""
    echo: str = ""
    """Text with which the response begins."""
    echo_start: int = 0
    """Number of tokens before those of `echo`: the one that starts every text, where it does."""


Prepared = tuple[list[TokenizedPrompt], SamplingParams]
"""The prompts of a request, and how they are continued."""


def parse(kind: type[Body], body: bytes) -> Body:
    """Parses the JSON body of a request. Raises Refused for the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise Refused(400, *fault(error)) from None


def prepare(
    request: Body, models: ServedModels, limits: Limits
) -> Generator[Reading, list[Ensemble], Prepared]:
    """Tokenises the prompts of a request, each of which is continued `n` times. Yields what models
    have to read first, where the vocabulary of a text depends on that, and is sent the result.
    Raises UserError or Refused where these models cannot answer it, or where it exceeds the
    limits."""
    ensemble, most = models.ensemble, limits.max_sequences + limits.max_waiting
    given = len(request.prompts) if isinstance(request, CompletionRequest) else 1
    if (count := given * (request.n or 1)) > most:
        message = f"a request may have {most} sequences, prompts times n; got {count}"
        raise Refused(400, message)
    prompts, masks, pools = yield from _tokenize(request, models)
    for ids, pool in zip(prompts, pools):
        check_prompt(pool, ids, 1 if request.most_tokens is None else request.most_tokens)
    space = min(pool.longest - len(ids) for ids, pool in zip(prompts, pools))
    sampling = request.sampling(ensemble.sampling, min(space, limits.max_tokens))
    if sampling.max_new_tokens > limits.max_tokens:
        message = f"max_tokens must be at most {limits.max_tokens}; got {sampling.max_new_tokens}"
        raise Refused(400, message, "max_tokens")
    _check_log_probabilities(request, prompts, sampling)
    try:
        language = None if request.language is None else canonical(request.language)
    except UserError as error:
        raise Refused(400, str(error), "language") from None
    tokenized = [
        TokenizedPrompt(
            ids=ids,
            user_mask=mask,
            pool=pool,
            language=language or models.language_of(ids, mask, pool),
            **_echo(request, index, ids, pool.tokenizer),
        )
        for index, (ids, mask, pool) in enumerate(zip(prompts, masks, pools))
    ]
    return tokenized, sampling


def _tokenize(
    request: Body, models: ServedModels
) -> Generator[
    Reading, list[Ensemble], tuple[list[list[int]], list[list[bool] | None], list[Ensemble]]
]:
    """Token ids of each prompt, for a chat the mask of the user's text, and the pool that reads
    them. Text follows the token that starts texts; ids are taken as they are, those for the
    ensemble as the seed's."""
    tokenizer = models.ensemble.tokenizer
    longest = max(map(len, request.texts), default=0)
    if longest > models.max_characters:
        raise UserError(
            f"a prompt of {longest:,} characters is longer than these models of "
            f"{models.ensemble.longest} tokens can read"
        )
    if isinstance(request, ChatRequest):
        if not tokenizer.hub.chat_template:
            raise UserError("the seed has no chat template; use /v1/completions")
        messages = [{"role": m.role, "content": m.text} for m in request.messages]
        options = _template_options(request, tokenizer)
        ids, mask = tokenizer.chat(messages, options)
        (pool,) = yield from _pools(request, models, [ids], [mask])
        if pool is not models.ensemble:
            ids, mask = pool.tokenizer.chat(messages, options)
        return [ids], [mask], [pool]
    prompts = [tokenizer.begin(p) if isinstance(p, str) else p for p in request.prompts]
    pools = [models.ensemble] * len(prompts)
    routed = [n for n, given in enumerate(request.prompts) if isinstance(given, str)]
    if request.model != ENSEMBLE:
        routed = list(range(len(prompts)))
    some = [prompts[number] for number in routed]
    found = yield from _pools(request, models, some, [None] * len(some))
    for number, pool in zip(routed, found):
        pools[number], given = pool, request.prompts[number]
        if isinstance(given, str) and pool is not models.ensemble:
            prompts[number] = pool.tokenizer.begin(given)
    return prompts, [None] * len(prompts), pools


def _pools(
    request: Body,
    models: ServedModels,
    prompts: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool] | None],
) -> Generator[Reading, list[Ensemble], list[Ensemble]]:
    """The pool that reads each prompt: of a model of another shape its own, otherwise that of a
    vocabulary."""
    name, language = request.model.removeprefix(f"{ENSEMBLE}:"), None
    if request.model != ENSEMBLE and name in models.alone:
        return [models.alone[name]] * len(prompts)
    if request.model == ENSEMBLE:
        language = request.language
    router, languages = models.routers[request.model], [language] * len(prompts)
    choice = Choice(models.ensemble, prompts, languages, masks, router)
    if not choice.reads:
        return finish(choice.decide())
    return (yield Reading(begin=choice.decide, tokens=sum(map(len, prompts))))


def _template_options(request: ChatRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    """Values for the chat template. Raises Refused for one that it does not use."""
    used = template_options(tokenizer.hub) if request.template_options else ()
    for name, (param, _) in request.template_options.items():
        if name not in used:
            message = f"{param}: the seed's chat template does not use {name!r:.80}; leave it out"
            raise Refused(400, message, param)
    return {name: value for name, (_, value) in request.template_options.items()}


def _echo(request: Body, index: int, ids: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields `echo` and `echo_start` of a prompt."""
    if not isinstance(request, CompletionRequest) or not request.echo:
        return {}
    prompt = request.prompts[index]
    if isinstance(prompt, str):
        return {"echo": prompt, "echo_start": tokenizer.starts(ids)}
    return {"echo": tokenizer.decode(prompt), "echo_start": 0}


def _check_log_probabilities(
    request: Body, prompts: Sequence[Sequence[int]], sampling: SamplingParams
) -> None:
    """Raises Refused where a request wants more log probabilities than it may."""
    if request.alternatives is None:
        return
    new = 0 if request.most_tokens == 0 else sampling.max_new_tokens
    scored = [len(ids) if request.scores_prompt else 0 for ids in prompts]
    wanted = sum(count + new for count in scored) * (request.alternatives + 1) * (request.n or 1)
    if wanted > MOST_LOG_PROBABILITIES:
        raise Refused(
            400,
            f"a request may ask for {MOST_LOG_PROBABILITIES:,} log probabilities: tokens times "
            f"alternatives and one; got {wanted:,}",
            "logprobs",
        )
