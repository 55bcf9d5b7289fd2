"""Answers to completions and chats: from the body of a request to the events of its texts."""

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from clustering.errors import UserError
from clustering.languages import canonical
from xelm.data.templates import template_options
from xelm.data.tokenizer import Tokenizer
from xelm.inference.generation import check_prompt
from xelm.inference.sampling import Sampling, TokenLikelihood
from xelm.serving.answers import Answer, Choice, TokenNames
from xelm.serving.desk import Busy, Closed, Desk, Ended, Event, Failed, Piece, Read, Ticket
from xelm.serving.errors import Refused, problem
from xelm.serving.limits import BODY_SECONDS, MOST_BYTES, MOST_LOG_PROBABILITIES, Limits
from xelm.serving.metrics import Metrics
from xelm.serving.offer import ENSEMBLE, Offer
from xelm.serving.requests import ChatRequest, CompletionRequest, wrong

GONE = 499
"""The status of a request whose client has left, as nginx has it; only metrics see it."""


_Said = Read | Piece | Ended
"""Events that an answer is made of."""


@dataclass(frozen=True)
class _Echo:
    """What of its prompt an answer repeats."""

    text: str = ""
    first: int = 0
    """Tokens of the prompt before those that are repeated: the one that starts every text."""


@dataclass(kw_only=True)
class _Asked:
    """A request under way."""

    answer: Answer
    model: str
    tickets: list[Ticket]
    languages: list[str | None]
    """The language of each ticket's text."""
    told: bool
    """Whether the request says the language; otherwise it is detected."""
    echoes: list["_Echo"]
    """What each ticket's answer begins with."""
    prompt_tokens: int
    began: float
    events: "asyncio.Queue[tuple[int, Event] | None]" = field(default_factory=asyncio.Queue)
    """With the place of the ticket; None when whoever asked has gone."""
    ends: dict[int, Ended] = field(default_factory=dict)

    def about(self, place: int, event: Piece | Ended) -> dict[str, Any]:
        """The `xelm` of a choice. Where nothing was routed, router and weights are null."""
        language = self.languages[place]
        source = None if language is None else "told" if self.told else "detected"
        found = {"language": language, "language_from": source}
        if not event.router:
            return {**found, "router": None, "weights": None}
        return {**found, "router": event.router, "weights": event.weights}

    def likelihoods(self, place: int, event: _Said) -> Sequence[TokenLikelihood]:
        """Those of an event's tokens that are in the answer."""
        first = self.echoes[place].first if isinstance(event, Read) else 0
        return event.likelihoods[first:]


@dataclass(kw_only=True)
class Completions:
    """The endpoints that continue texts."""

    desk: Desk
    metrics: Metrics
    limits: Limits
    encoding: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One request's text is cut into ids at a time."""
    names: TokenNames | None = None

    async def answer(
        self, request: Request, kind: type[CompletionRequest] | type[ChatRequest]
    ) -> Response:
        began, model = time.monotonic(), "unknown"
        try:
            try:
                asked = await run_in_threadpool(kind.model_validate_json, await _body(request))
            except ValidationError as error:
                raise Refused(400, *wrong(error)) from None
            check_model(asked.model, self.desk.offer)
            model = asked.model
            under_way = await self._submitted(asked, began)
            response = await self._answered(request, asked, under_way)
        except ClientDisconnect:
            self.metrics.request(model, GONE)
            return Response(status_code=GONE)
        except Exception as error:
            self.metrics.request(model, error.status if isinstance(error, Refused) else 500)
            raise
        if not isinstance(response, StreamingResponse):  # that is counted when it ends
            self.metrics.request(model, response.status_code)
        return response

    def _names(self, offer: Offer) -> TokenNames:
        if self.names is None or self.names.tokenizer is not offer.ensemble.tokenizer:
            self.names = TokenNames(offer.ensemble.tokenizer)
        return self.names

    async def _submitted(self, asked: CompletionRequest | ChatRequest, began: float) -> _Asked:
        offer = self.desk.offer
        try:
            async with self.encoding:
                prompts, audible = await run_in_threadpool(_encoded, asked, offer)
            for ids in prompts:
                most = 1 if asked.most_tokens is None else asked.most_tokens
                check_prompt(offer.ensemble, ids, most)
            sampling = asked.sampling(
                offer.ensemble.sampling,
                offer.ensemble.model.max_length - max(map(len, prompts)),
                self.limits.tokens,
            )
            if sampling.max_new_tokens > self.limits.tokens:
                raise Refused(
                    400,
                    f"max_tokens must be at most {self.limits.tokens} here; got "
                    f"{sampling.max_new_tokens}",
                    "max_tokens",
                )
            language, count = _told(asked.language), asked.n or 1
            languages = [
                language or offer.language_of(ids if said is None else said)
                for ids, said in zip(prompts, audible)
            ]
            under_way = _Asked(
                answer=Answer(
                    asked.model,
                    self._names(offer),
                    chat=isinstance(asked, ChatRequest),
                    likelihoods=asked.alternatives is not None,
                ),
                model=asked.model,
                tickets=[],
                languages=[language for language in languages for _ in range(count)],
                told=language is not None,
                echoes=[echo for echo in _echoes(asked, prompts, offer) for _ in range(count)],
                prompt_tokens=sum(map(len, prompts)),
                began=began,
            )
            under_way.tickets += self._tickets(asked, prompts, audible, sampling, under_way)
            places = self.limits.texts + self.limits.waiting
            if len(under_way.tickets) > places:
                raise Refused(
                    400,
                    f"a request may have {places} texts here, prompts times n; got "
                    f"{len(under_way.tickets)}",
                )
            _check_log_probabilities(under_way.tickets)
            self.desk.submit(under_way.tickets)
        except UserError as error:
            raise Refused(400, str(error)) from None
        except Closed:
            raise Refused(503, "the server stops, or has failed") from None
        except Busy:
            raise Refused(429, "too many requests wait already; try again later") from None
        return under_way

    def _tickets(
        self,
        asked: CompletionRequest | ChatRequest,
        prompts: Sequence[Sequence[int]],
        audible: Sequence[Sequence[int] | None],
        sampling: Sampling,
        under_way: _Asked,
    ) -> list[Ticket]:
        count = asked.n or 1

        def ticket(place: int) -> Ticket:
            return Ticket(
                model=asked.model,
                ids=prompts[place // count],
                audible=audible[place // count],
                sampling=sampling,
                language=asked.language if asked.model == ENSEMBLE else None,
                number=place,
                alternatives=asked.alternatives,
                scores_prompt=asked.echoes and asked.alternatives is not None,
                draws=asked.most_tokens != 0,
                tell=lambda event: under_way.events.put_nowait((place, event)),
                until=under_way.began + self.limits.seconds,
            )

        return [ticket(place) for place in range(len(prompts) * count)]

    async def _answered(
        self, request: Request, asked: CompletionRequest | ChatRequest, under_way: _Asked
    ) -> Response:
        gone = asyncio.create_task(_gone(request))

        def leave(_: object) -> None:
            self.desk.cancel(
                [t for n, t in enumerate(under_way.tickets) if n not in under_way.ends]
            )
            under_way.events.put_nowait(None)

        gone.add_done_callback(leave)
        try:
            # With the first event, so that what fails at once is told by the status.
            first = await self._next(under_way)
            if first is None:
                return Response(status_code=GONE)
            self.metrics.began(time.monotonic() - under_way.began)
            if not asked.stream:
                return await self._whole(under_way, first, gone)
        except BaseException:
            gone.cancel()
            raise
        return StreamingResponse(
            self._stream(asked, under_way, first, gone),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def _next(self, under_way: _Asked) -> tuple[int, _Said] | None:
        """The next event; None when whoever asked has gone. Raises Refused for a failure."""
        found = await under_way.events.get()
        if found is None:
            return None
        place, event = found
        if isinstance(event, Failed):
            raise Refused(event.status, event.message)
        if isinstance(event, Ended):
            under_way.ends[place] = event
            if under_way.model == ENSEMBLE:
                self.metrics.routed(under_way.languages[place], event)
            if len(under_way.ends) == len(under_way.tickets):
                self.metrics.ended(time.monotonic() - under_way.began)
        return place, event

    async def _whole(
        self, under_way: _Asked, first: tuple[int, _Said], gone: "asyncio.Task[None]"
    ) -> Response:
        choices = [Choice(text=echo.text) for echo in under_way.echoes]
        found: tuple[int, _Said] | None = first
        while found is not None:
            place, event = found
            if isinstance(event, Piece):
                choices[place].text += event.text
            choices[place].likelihoods += under_way.likelihoods(place, event)
            if len(under_way.ends) == len(choices):
                break
            found = await self._next(under_way)
        gone.cancel()
        if found is None:
            return Response(status_code=GONE)
        ends = [under_way.ends[place] for place in range(len(choices))]
        about = [under_way.about(place, end) for place, end in enumerate(ends)]

        def response() -> Response:
            tokens = under_way.prompt_tokens
            return JSONResponse(under_way.answer.whole(choices, ends, about, tokens))

        # Bodies may be long: other requests are answered meanwhile.
        return await run_in_threadpool(response)

    async def _stream(
        self,
        asked: CompletionRequest | ChatRequest,
        under_way: _Asked,
        first: tuple[int, _Said],
        gone: "asyncio.Task[None]",
    ) -> AsyncIterator[str]:
        answer, chat, status = under_way.answer, isinstance(asked, ChatRequest), GONE
        try:
            for place in range(len(under_way.tickets) if chat else 0):
                yield _event(answer.part(place, "", None, first=True))
            for place, echo in enumerate(under_way.echoes):
                if echo.text and not under_way.tickets[place].scores_prompt:
                    yield _event(answer.part(place, echo.text, None))
            found: tuple[int, _Said] | None = first
            while found is not None:
                place, event = found
                text = event.text if isinstance(event, Piece) else ""
                text = under_way.echoes[place].text if isinstance(event, Read) else text
                made = functools.partial(
                    answer.part,
                    place,
                    text,
                    None if isinstance(event, Read) else under_way.about(place, event),
                    likelihoods=under_way.likelihoods(place, event),
                    reason=event.reason if isinstance(event, Ended) else None,
                )
                if isinstance(event, Read):  # of all tokens of a prompt, which takes a while
                    yield await run_in_threadpool(lambda made: _event(made()), made)
                else:
                    yield _event(made())
                if len(under_way.ends) == len(under_way.tickets):
                    break
                found = await self._next(under_way)
            if found is None:
                return
            if asked.usage_wanted:
                tokens = sum(end.tokens for end in under_way.ends.values())
                yield _event(answer.last(under_way.prompt_tokens, tokens))
            status = 200
            yield "data: [DONE]\n\n"
        except Refused as refused:
            status = refused.status
            yield _event(problem(str(refused), refused.status))
        finally:
            self.metrics.request(under_way.model, status)
            gone.cancel()


async def _gone(request: Request) -> None:
    """Ends when whoever asked has gone, or at the end of the request."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    too_long = Refused(413, f"a request may have {MOST_BYTES:,} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > MOST_BYTES:
        raise too_long
    _check_type(request.headers.get("content-type", ""))
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise too_long
    except TimeoutError:
        raise Refused(408, f"a request comes within {BODY_SECONDS:g} seconds") from None
    return bytes(body)


def _told(language: str | None) -> str | None:
    """The language that a request names, as a canonical tag. Raises Refused for what is none."""
    try:
        return None if language is None else canonical(language)
    except UserError as error:
        raise Refused(400, str(error), "language") from None


def _check_type(given: str) -> None:
    """Raises Refused unless a Content-Type is that of JSON in UTF-8, in any case."""
    message = Message()
    message["Content-Type"] = given
    charset = message.get_content_charset("utf-8")
    if message.get_content_type() != "application/json" or charset not in ("utf-8", "utf8"):
        raise Refused(
            415, f"requests are application/json, in UTF-8; got Content-Type {given!r:.80}"
        )


def _check_log_probabilities(tickets: Sequence[Ticket]) -> None:
    """Raises Refused for texts of a request of which more log probabilities are wanted than may."""
    wanted = 0
    for ticket in tickets:
        if ticket.alternatives is not None:
            scored = len(ticket.ids) if ticket.scores_prompt else 0
            wanted += (scored + ticket.new_tokens) * (ticket.alternatives + 1)
    if wanted > MOST_LOG_PROBABILITIES:
        raise Refused(
            400,
            f"a request may ask for {MOST_LOG_PROBABILITIES:,} log probabilities: tokens times "
            f"alternatives and one; got {wanted:,}",
            "logprobs",
        )


def check_model(name: str, offer: Offer) -> None:
    """Raises Refused for a model that is not served."""
    if name not in offer.routers:
        message = f"there is no model {name!r:.80}; there are: {', '.join(offer.routers)}"
        raise Refused(404, message, "model", "model_not_found")


def _encoded(
    asked: CompletionRequest | ChatRequest, offer: Offer
) -> tuple[list[list[int]], list[list[int] | None]]:
    """Ids of each prompt: of a text after the one that starts texts, and ids as they are. And what
    the router hears of each: in a chat what the user says; None: all of it."""
    tokenizer = offer.ensemble.tokenizer
    texts = [prompt for prompt in getattr(asked, "prompts", ()) if isinstance(prompt, str)]
    texts += [message.text for message in getattr(asked, "messages", ())]
    if max(map(len, texts), default=0) > offer.most_characters:
        raise UserError(
            f"a prompt of {max(map(len, texts)):,} characters is longer than these models of "
            f"{offer.ensemble.model.max_length} tokens can read"
        )
    if isinstance(asked, ChatRequest):
        if not tokenizer.hub.chat_template:
            raise UserError("the seed has no chat template; use /v1/completions")
        messages = [{"role": m.role, "content": m.text} for m in asked.messages]
        ids = tokenizer.chat(messages, _options(asked, tokenizer))
        return [ids], [tokenizer.user_ids(messages)]
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


def _echoes(
    asked: CompletionRequest | ChatRequest, prompts: Sequence[Sequence[int]], offer: Offer
) -> list[_Echo]:
    """What the answer repeats of each prompt: all that was given, and nothing put before it."""
    if not isinstance(asked, CompletionRequest) or not asked.echo:
        return [_Echo()] * len(prompts)
    tokenizer, found = offer.ensemble.tokenizer, []
    for prompt, ids in zip(asked.prompts, prompts):
        given = tokenizer.encode([prompt])[0] if isinstance(prompt, str) else prompt
        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        found.append(_Echo(text, len(ids) - len(given)))
    return found


def _event(body: Any) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
