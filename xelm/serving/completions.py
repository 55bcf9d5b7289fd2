"""Answers to completions and chats: from the body of a request to the events of its texts."""

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from clustering.errors import UserError
from xelm.inference.sampling import TokenLikelihood
from xelm.inference.sampling_params import SamplingParams
from xelm.serving.answers import Answer, Choice, TokenNames
from xelm.serving.desk import Busy, Closed, Desk, Ended, Event, Failed, Piece, Read, Ticket
from xelm.serving.errors import Refused, problem
from xelm.serving.limits import BODY_SECONDS, MOST_BYTES, Limits
from xelm.serving.metrics import Metrics
from xelm.serving.offer import ENSEMBLE, Offer
from xelm.serving.preparation import PreparedText, parsed, prepare
from xelm.serving.requests import ChatRequest, CompletionRequest

GONE = 499
"""The status of a request whose client has left, as nginx has it; only metrics see it."""


_Said = Read | Piece | Ended
"""Events that an answer is made of."""


@dataclass(kw_only=True)
class _Asked:
    """A request under way."""

    answer: Answer
    model: str
    tickets: list[Ticket]
    texts: list[PreparedText]
    """The prompt of each ticket."""
    told: bool
    """Whether the request says the language; otherwise it is detected."""
    prompt_tokens: int
    began: float
    events: "asyncio.Queue[tuple[int, Event] | None]" = field(default_factory=asyncio.Queue)
    """With the place of the ticket; None when whoever asked has gone."""
    ends: dict[int, Ended] = field(default_factory=dict)

    def about(self, place: int, event: Piece | Ended) -> dict[str, Any]:
        """The `xelm` of a choice. Where nothing was routed, router and weights are null."""
        language = self.texts[place].language
        source = None if language is None else "told" if self.told else "detected"
        found = {"language": language, "language_from": source}
        if not event.router:
            return {**found, "router": None, "weights": None}
        return {**found, "router": event.router, "weights": event.weights}

    def likelihoods(self, place: int, event: _Said) -> Sequence[TokenLikelihood]:
        """Those of an event's tokens that are in the answer."""
        first = self.texts[place].start if isinstance(event, Read) else 0
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
            asked = await run_in_threadpool(parsed, kind, await _body(request))
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
                prepared = await run_in_threadpool(prepare, asked, offer, self.limits)
            under_way = _Asked(
                answer=Answer(
                    asked.model,
                    self._names(offer),
                    chat=isinstance(asked, ChatRequest),
                    likelihoods=asked.alternatives is not None,
                ),
                model=asked.model,
                tickets=[],
                texts=[text for text in prepared.texts for _ in range(asked.n or 1)],
                told=prepared.language is not None,
                prompt_tokens=sum(len(text.ids) for text in prepared.texts),
                began=began,
            )
            under_way.tickets += self._tickets(asked, prepared.sampling, under_way)
            # Every id is looked at once more, by the models that are served by now.
            await run_in_threadpool(self.desk.submit, under_way.tickets)
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
        sampling: SamplingParams,
        under_way: _Asked,
    ) -> list[Ticket]:
        def ticket(place: int, text: PreparedText) -> Ticket:
            return Ticket(
                model=asked.model,
                ids=text.ids,
                user_mask=text.user_mask,
                sampling=sampling,
                language=asked.language if asked.model == ENSEMBLE else None,
                number=place,
                alternatives=asked.alternatives,
                scores_prompt=asked.scores_prompt,
                draws=asked.most_tokens != 0,
                tell=lambda event: under_way.events.put_nowait((place, event)),
                until=under_way.began + self.limits.seconds,
            )

        return [ticket(place, text) for place, text in enumerate(under_way.texts)]

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
                self.metrics.routed(under_way.texts[place].language, event)
            if len(under_way.ends) == len(under_way.tickets):
                self.metrics.ended(time.monotonic() - under_way.began)
        return place, event

    async def _whole(
        self, under_way: _Asked, first: tuple[int, _Said], gone: "asyncio.Task[None]"
    ) -> Response:
        choices = [Choice(text=text.echo) for text in under_way.texts]
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
            for place, prompt in enumerate(under_way.texts):
                if prompt.echo and not under_way.tickets[place].scores_prompt:
                    made = functools.partial(answer.part, place, prompt.echo, None)
                    yield await run_in_threadpool(_made, made)
            found: tuple[int, _Said] | None = first
            while found is not None:
                place, event = found
                text = event.text if isinstance(event, Piece) else ""
                text = under_way.texts[place].echo if isinstance(event, Read) else text
                likelihoods = under_way.likelihoods(place, event)
                made = functools.partial(
                    answer.part,
                    place,
                    text,
                    None if isinstance(event, Read) else under_way.about(place, event),
                    likelihoods=likelihoods,
                    reason=event.reason if isinstance(event, Ended) else None,
                )
                # Naming many tokens, such as all of a prompt, takes a while.
                yield await run_in_threadpool(_made, made) if likelihoods else _made(made)
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


def _check_type(given: str) -> None:
    """Raises Refused unless a Content-Type is that of JSON in UTF-8, in any case."""
    message = Message()
    message["Content-Type"] = given
    charset = message.get_content_charset("utf-8")
    if message.get_content_type() != "application/json" or charset not in ("utf-8", "utf8"):
        raise Refused(
            415, f"requests are application/json, in UTF-8; got Content-Type {given!r:.80}"
        )


def check_model(name: str, offer: Offer) -> None:
    """Raises Refused for a model that is not served."""
    if name not in offer.routers:
        message = f"there is no model {name[:80]!r}; there are: {', '.join(offer.routers)}"
        raise Refused(404, message, "model", "model_not_found")


def _event(body: Any) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _made(body: Callable[[], Any]) -> str:
    """The event with a body that is built by this call."""
    return _event(body())
