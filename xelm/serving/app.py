"""The interface over HTTP."""

import asyncio
import functools
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from clustering.errors import UserError
from clustering.languages import canonical
from xelm.inference.generation import check_prompt
from xelm.inference.sampling import Sampling
from xelm.serving import metrics as prometheus
from xelm.serving.desk import Busy, Closed, Desk, Ended, Event, Failed, Piece, Ticket
from xelm.serving.metrics import Metrics
from xelm.serving.offer import ENSEMBLE, Offer
from xelm.serving.protocol import Answer, ChatRequest, CompletionRequest, problem, wrong

MOST_BYTES = 4 * 2**20
"""Of a request."""
BODY_SECONDS = 30.0
"""In which it comes."""
GONE = 499
"""The status of a request whose client has left, as nginx has it; nobody sees it but metrics."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Of each request, and of all."""

    tokens: int = 1024
    """That each text of a request may have drawn."""
    seconds: float = 300.0
    """After which a continuation ends."""
    texts: int = 32
    """That are continued at once."""
    waiting: int = 128
    """Others that may wait; beyond, requests are refused."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("tokens", self.tokens, 1),
            ("texts", self.texts, 1),
            ("waiting", self.waiting, 0),
        ):
            if value < least:
                raise UserError(f"the limit of {name} must be at least {least}; got {value}")
        if not 0 < self.seconds < float("inf"):
            raise UserError(f"the limit of seconds must be above 0; got {self.seconds}")


class Refused(Exception):
    """A request that is answered by a problem."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.param = status, param


def make_app(
    desk: Desk,
    metrics: Metrics,
    limits: Limits,
    *,
    key: str | None = None,
    hosts: Sequence[str] | None = None,
) -> Starlette:
    """key: that requests must have; None asks for none. hosts: under which names requests may come;
    None is any."""
    interface = _Interface(desk=desk, metrics=metrics, limits=limits, key=key)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.loop = asyncio.get_running_loop()
        yield

    allowed = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))] if hosts else []
    locked = interface.locked
    return Starlette(
        routes=[
            Route("/", interface.page),
            Route("/healthz", interface.health),
            Route("/metrics", locked(interface.told)),
            Route("/v1/models", locked(interface.models)),
            Route("/v1/models/{name:path}", locked(interface.model)),
            Route(
                "/v1/completions",
                locked(functools.partial(interface.answer, kind=CompletionRequest)),
                methods=["POST"],
            ),
            Route(
                "/v1/chat/completions",
                locked(functools.partial(interface.answer, kind=ChatRequest)),
                methods=["POST"],
            ),
        ],
        middleware=allowed,
        exception_handlers={HTTPException: _of_starlette, Exception: _of_ours},
        lifespan=lifespan,
    )


def _of_starlette(request: Request, error: Exception) -> Response:
    """Of paths and methods that there are not."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    body = problem(what, error.status_code)
    body["error"]["code"] = None
    return JSONResponse(body, error.status_code, headers=error.headers)


def _of_ours(request: Request, error: Exception) -> Response:
    return JSONResponse(problem("the server failed at this request", 500), 500)


@dataclass(kw_only=True)
class _Asked:
    """A request under way."""

    answer: Answer
    model: str
    tickets: list[Ticket]
    languages: list[str | None]
    """Of each ticket's text."""
    prompt_tokens: int
    began: float
    events: "asyncio.Queue[tuple[int, Event] | None]" = field(default_factory=asyncio.Queue)
    """With the place of the ticket; None when whoever asked has gone."""
    ends: dict[int, Ended] = field(default_factory=dict)

    def about(self, place: int, weights: Any) -> dict[str, Any]:
        """The `xelm` of a choice."""
        return {"language": self.languages[place], "weights": weights}


@dataclass(kw_only=True)
class _Interface:
    desk: Desk
    metrics: Metrics
    limits: Limits
    key: str | None
    created: int = field(default_factory=lambda: int(time.time()))
    encoding: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One request's text is cut into ids at a time."""

    def locked(
        self, endpoint: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint for those who have the key; refusals as problems."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
            except Refused as refused:
                self.metrics.request("unknown", refused.status)
                return JSONResponse(problem(str(refused), refused.status), refused.status)
            try:
                return await endpoint(request)
            except Refused as refused:
                wait = {"Retry-After": "1"} if refused.status == 429 else None
                body = problem(str(refused), refused.status, refused.param)
                return JSONResponse(body, refused.status, headers=wait)

        return guarded

    def _check_key(self, request: Request) -> None:
        if self.key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self.key.encode())
        if kind.lower() != "bearer" or not same:
            raise Refused(401, "this server wants its API key: Authorization: Bearer KEY")

    async def page(self, request: Request) -> Response:
        text = files("xelm.serving").joinpath("page.html").read_text(encoding="utf-8")
        rules = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        rules += "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
        return HTMLResponse(text, headers={"Content-Security-Policy": rules})

    async def health(self, request: Request) -> Response:
        alive = self.desk.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def told(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=prometheus.CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        offer = self.desk.offer
        data = [self._model(name, offer) for name in offer.routers]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        offer, name = self.desk.offer, request.path_params["name"]
        _check_model(name, offer)
        return JSONResponse(self._model(name, offer))

    def _model(self, name: str, offer: Offer) -> dict[str, Any]:
        found: dict[str, Any] = {"id": name, "object": "model", "created": self.created}
        found |= {"owned_by": "xelm"}
        version = offer.versions.get(name.removeprefix(f"{ENSEMBLE}:"))
        if name == ENSEMBLE:
            found["experts"] = dict(offer.versions)
        elif version is not None:
            found["version"] = version
        return found

    async def answer(
        self, request: Request, kind: type[CompletionRequest] | type[ChatRequest]
    ) -> Response:
        began, model = time.monotonic(), "unknown"
        try:
            try:
                asked = await run_in_threadpool(kind.model_validate_json, await _body(request))
            except ValidationError as error:
                raise Refused(400, *wrong(error)) from None
            _check_model(asked.model, self.desk.offer)
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

    async def _submitted(self, asked: CompletionRequest | ChatRequest, began: float) -> _Asked:
        offer = self.desk.offer
        try:
            async with self.encoding:
                prompts = await run_in_threadpool(_encoded, asked, offer)
            for ids in prompts:
                check_prompt(offer.ensemble, ids, asked.most_tokens or 1)
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
            language = None if asked.language is None else canonical(asked.language)
            told = [language or offer.language_of(ids) for ids in prompts]
            under_way = _Asked(
                answer=Answer(asked.model, chat=isinstance(asked, ChatRequest)),
                model=asked.model,
                tickets=[],
                languages=[language for language in told for _ in range(asked.n or 1)],
                prompt_tokens=sum(map(len, prompts)),
                began=began,
            )
            under_way.tickets += self._tickets(asked, prompts, sampling, under_way)
            places = self.limits.texts + self.limits.waiting
            if len(under_way.tickets) > places:
                raise Refused(
                    400,
                    f"a request may have {places} texts here, prompts times n; got "
                    f"{len(under_way.tickets)}",
                )
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
        sampling: Sampling,
        under_way: _Asked,
    ) -> list[Ticket]:
        count = asked.n or 1

        def ticket(place: int) -> Ticket:
            return Ticket(
                model=asked.model,
                ids=prompts[place // count],
                sampling=sampling,
                language=asked.language if asked.model == ENSEMBLE else None,
                number=place,
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

    async def _next(self, under_way: _Asked) -> tuple[int, Piece | Ended] | None:
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
        self, under_way: _Asked, first: tuple[int, Piece | Ended], gone: "asyncio.Task[None]"
    ) -> Response:
        texts = [""] * len(under_way.tickets)
        found: tuple[int, Piece | Ended] | None = first
        while found is not None:
            place, event = found
            if isinstance(event, Piece):
                texts[place] += event.text
            if len(under_way.ends) == len(texts):
                break
            found = await self._next(under_way)
        gone.cancel()
        if found is None:
            return Response(status_code=GONE)
        ends = [under_way.ends[place] for place in range(len(texts))]
        about = [under_way.about(place, end.weights) for place, end in enumerate(ends)]
        return JSONResponse(under_way.answer.whole(texts, ends, about, under_way.prompt_tokens))

    async def _stream(
        self,
        asked: CompletionRequest | ChatRequest,
        under_way: _Asked,
        first: tuple[int, Piece | Ended],
        gone: "asyncio.Task[None]",
    ) -> AsyncIterator[str]:
        answer, chat, status = under_way.answer, isinstance(asked, ChatRequest), GONE
        try:
            for place in range(len(under_way.tickets) if chat else 0):
                yield _event(answer.part(place, "", None, first=True))
            found: tuple[int, Piece | Ended] | None = first
            while found is not None:
                place, event = found
                text = event.text if isinstance(event, Piece) else ""
                reason = event.reason if isinstance(event, Ended) else None
                about = under_way.about(place, event.weights)
                yield _event(answer.part(place, text, about, reason=reason))
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
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused(415, "requests are application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise too_long
    except TimeoutError:
        raise Refused(408, f"a request comes within {BODY_SECONDS:.0f} seconds") from None
    return bytes(body)


def _check_model(name: str, offer: Offer) -> None:
    if name not in offer.routers:
        there = ", ".join(offer.routers)
        raise Refused(404, f"there is no model {name!r:.80}; there are: {there}", "model")


def _encoded(asked: CompletionRequest | ChatRequest, offer: Offer) -> list[list[int]]:
    """Ids of each prompt, after the one that starts every text."""
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
        return [tokenizer.chat(messages)]
    return [
        tokenizer.begin(prompt)
        if isinstance(prompt, str)
        else [*([tokenizer.start_id] if prompt[0] != tokenizer.start_id else []), *prompt]
        for prompt in asked.prompts
    ]


def _event(body: Any) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
