"""Endpoints for completions and chats: from the body of a request to its response or stream."""

import asyncio
import time
from collections.abc import AsyncIterator, Generator
from dataclasses import dataclass, field
from email.message import Message
from functools import partial

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response, StreamingResponse

from clustering.errors import UserError
from xelm.data.tokenizer import Tokenizer
from xelm.inference.ensemble import Ensemble
from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.sampling_params import SamplingParams
from xelm.serving.batch import LATE, Event, Failed, Finished, Request, TextDelta
from xelm.serving.errors import Refused, error_body
from xelm.serving.limits import BODY_SECONDS, MOST_BYTES, Limits
from xelm.serving.metrics import Metrics
from xelm.serving.models import ENSEMBLE, ServedModels
from xelm.serving.openai_prompts import Prepared, Reading, parse, prepare
from xelm.serving.openai_requests import Body
from xelm.serving.openai_responses import Choice, Progress, ResponseBodies, TokenNames, server_sent
from xelm.serving.scheduler import QueueFull, Scheduler, ShuttingDown
from xelm.serving.scoring_queue import NoMemory

DISCONNECTED = 499
"""Status of a request whose client has disconnected, as in nginx; only metrics show it."""


@dataclass(kw_only=True)
class _InFlight:
    """An HTTP request that is being answered; a sequence is one prompt, continued once."""

    body: Body
    responses: ResponseBodies
    choices: list[Choice]
    """One for each sequence."""
    started: float
    metrics: Metrics
    requests: list[Request] = field(default_factory=list)
    """The scheduler's request for each sequence."""
    events: "asyncio.Queue[tuple[Choice, Event] | None]" = field(default_factory=asyncio.Queue)
    """A choice and what happened to it; None when the client has disconnected."""

    @property
    def complete(self) -> bool:
        """Whether all sequences are finished."""
        return all(choice.end for choice in self.choices)

    async def next(self) -> tuple[Choice, Progress] | None:
        """The next event; None when the client has disconnected. Raises Refused for a failure."""
        found = await self.events.get()
        if found is None:
            return None
        choice, event = found
        if isinstance(event, Failed):
            raise Refused(event.status, event.message)
        if isinstance(event, Finished):
            choice.end = event
            if self.body.model == ENSEMBLE:
                self.metrics.routed(choice.prompt.language, event)
            if self.complete:
                self.metrics.complete.observe(time.monotonic() - self.started)
        return choice, event


@dataclass(kw_only=True)
class Completions:
    """The endpoints that generate text."""

    scheduler: Scheduler
    metrics: Metrics
    limits: Limits
    tokenizing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the prompts of a request are tokenised: one request at a time."""
    names: dict[Tokenizer, TokenNames] = field(default_factory=dict)
    """Names of tokens by the tokenizers of the models that are served."""

    async def respond(self, http_request: HTTPRequest, kind: type[Body]) -> Response:
        """The response to a request with a body of this kind. Raises Refused."""
        started, model = time.monotonic(), "unknown"
        try:
            body = await run_in_threadpool(parse, kind, await _read_body(http_request))
            check_model(body.model, self.scheduler.models)
            model = body.model
            disconnected = asyncio.create_task(_disconnected(http_request))
            try:
                in_flight = await self._submit(body, started, disconnected)
                response = await self._respond(in_flight, disconnected)
            except BaseException:
                disconnected.cancel()
                raise
        except ClientDisconnect:
            self.metrics.request(model, DISCONNECTED)
            return Response(status_code=DISCONNECTED)
        except Exception as error:
            self.metrics.request(model, error.status if isinstance(error, Refused) else 500)
            raise
        if not isinstance(response, StreamingResponse):  # a stream is counted when it ends
            self.metrics.request(model, response.status_code)
        return response

    async def _submit(
        self, body: Body, started: float, disconnected: "asyncio.Task[None]"
    ) -> _InFlight:
        models = self.scheduler.models
        try:
            preparing, pools = prepare(body, models, self.limits), None
            while True:
                async with self.tokenizing:
                    step = await run_in_threadpool(_advance, preparing, pools)
                if not isinstance(step, Reading):
                    break
                # Other requests are tokenised meanwhile.
                pools = await self._read(step, models, started, disconnected)
            prompts, sampling = step
            tokens = sum(len(prompt.ids) for prompt in prompts)
            sequences = enumerate(prompt for prompt in prompts for _ in range(body.n or 1))
            in_flight = _InFlight(
                body=body,
                responses=ResponseBodies(body, self._token_names, tokens),
                choices=[Choice(index=i, prompt=one, text=one.echo) for i, one in sequences],
                started=started,
                metrics=self.metrics,
            )
            in_flight.requests = [
                self._request(in_flight, choice, sampling, models.key_of(choice.prompt.pool))
                for choice in in_flight.choices
            ]
            # In a worker thread: the scheduler may hold its lock for a while.
            await run_in_threadpool(self.scheduler.submit, in_flight.requests)
        except UserError as error:
            raise Refused(400, str(error)) from None
        except ShuttingDown:
            raise Refused(503, "the server is shutting down or has failed") from None
        except QueueFull:
            raise Refused(429, "too many requests are waiting; try again later") from None
        return in_flight

    async def _read(
        self,
        reading: Reading,
        models: ServedModels,
        started: float,
        disconnected: "asyncio.Task[None]",
    ) -> list[Ensemble]:
        """Has models read the prompts of a request. Raises ClientDisconnect if its client
        disconnects, and Refused when its time is up."""
        memory = models.ensemble.parameters
        assert isinstance(memory, ParameterCache)
        call = asyncio.wrap_future(self.scheduler.call(reading.begin, reading.tokens, memory))
        left = started + self.limits.max_seconds - time.monotonic()
        awaited = {call, disconnected}
        await asyncio.wait(awaited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if call.done():
            try:
                return call.result()
            except NoMemory as error:
                raise Refused(503, str(error)) from None
        call.cancel()
        if disconnected.done():
            raise ClientDisconnect
        raise Refused(503, LATE)

    def _request(
        self, in_flight: _InFlight, choice: Choice, sampling: SamplingParams, pool: str | None
    ) -> Request:
        body = in_flight.body
        return Request(
            model=body.model,
            ids=choice.prompt.ids,
            user_mask=choice.prompt.user_mask,
            sampling=sampling,
            language=body.language if body.model == ENSEMBLE else None,
            pool=pool,
            number=choice.index,
            alternatives=body.alternatives,
            scores_prompt=body.scores_prompt,
            generates=body.most_tokens != 0,
            on_event=lambda event: in_flight.events.put_nowait((choice, event)),
            deadline=in_flight.started + self.limits.max_seconds,
        )

    def _token_names(self, tokenizer: Tokenizer) -> TokenNames:
        if tokenizer not in self.names:
            served = {pool.tokenizer for pool in self.scheduler.models.pools.values()}
            self.names = {each: names for each, names in self.names.items() if each in served}
            self.names[tokenizer] = TokenNames(tokenizer)
        return self.names[tokenizer]

    async def _respond(self, in_flight: _InFlight, disconnected: "asyncio.Task[None]") -> Response:
        def cancel(_: object) -> None:
            pairs = zip(in_flight.choices, in_flight.requests)
            self.scheduler.cancel([request for choice, request in pairs if not choice.end])
            in_flight.events.put_nowait(None)

        disconnected.add_done_callback(cancel)
        # The first event is awaited here, so that an early failure has its HTTP status.
        first = await in_flight.next()
        if first is None:
            return Response(status_code=DISCONNECTED)
        self.metrics.first_event.observe(time.monotonic() - in_flight.started)
        if not in_flight.body.stream:
            response = await self._collect(in_flight, first)
            disconnected.cancel()
            return response
        return StreamingResponse(
            self._stream(in_flight, first, disconnected),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def _collect(self, in_flight: _InFlight, first: tuple[Choice, Progress]) -> Response:
        found: tuple[Choice, Progress] | None = first
        while found is not None:
            choice, event = found
            if isinstance(event, TextDelta):
                choice.text += event.text
            choice.likelihoods += choice.tokens_of(event)
            if in_flight.complete:
                # In a worker thread: the body may be long.
                return await run_in_threadpool(in_flight.responses.full, in_flight.choices)
            found = await in_flight.next()
        return Response(status_code=DISCONNECTED)

    async def _stream(
        self,
        in_flight: _InFlight,
        first: tuple[Choice, Progress],
        disconnected: "asyncio.Task[None]",
    ) -> AsyncIterator[str]:
        status, responses, choices = DISCONNECTED, in_flight.responses, in_flight.choices
        try:
            for chunk in await run_in_threadpool(responses.first_chunks, choices):
                yield chunk
            found: tuple[Choice, Progress] | None = first
            while found is not None:
                make = partial(responses.chunk, *found)
                # Many tokens, such as all of a prompt, take a while.
                yield await run_in_threadpool(make) if found[1].likelihoods else make()
                if in_flight.complete:
                    break
                found = await in_flight.next()
            if found is None:
                return
            if in_flight.body.usage_wanted:
                yield responses.usage_chunk(choices)
            status = 200
            yield "data: [DONE]\n\n"
        except Refused as refused:
            status = refused.status
            yield server_sent(error_body(str(refused), refused.status))
        finally:
            self.metrics.request(in_flight.body.model, status)
            disconnected.cancel()


def _advance(
    preparing: Generator[Reading, list[Ensemble], Prepared], pools: list[Ensemble] | None
) -> Reading | Prepared:
    """The next thing that models have to read for a request, or its prompts. pools: what was read;
    None at the beginning."""
    try:
        return next(preparing) if pools is None else preparing.send(pools)
    except StopIteration as end:
        return end.value


async def _disconnected(http_request: HTTPRequest) -> None:
    """Returns when the client has disconnected, or at the end of the request."""
    while (await http_request.receive())["type"] != "http.disconnect":
        pass


async def _read_body(http_request: HTTPRequest) -> bytes:
    """The body of a request. Raises Refused for one that is too long, late or not JSON."""
    too_long = Refused(413, f"a request may have {MOST_BYTES:,} bytes")
    declared = http_request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > MOST_BYTES:
        raise too_long
    _check_content_type(http_request.headers.get("content-type", ""))
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http_request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise too_long
    except TimeoutError:
        message = f"the body of a request must arrive within {BODY_SECONDS:g} seconds"
        raise Refused(408, message) from None
    return bytes(body)


def _check_content_type(given: str) -> None:
    """Raises Refused unless a Content-Type is that of JSON in UTF-8, in any case."""
    message = Message()
    message["Content-Type"] = given
    charset = message.get_content_charset("utf-8")
    if message.get_content_type() != "application/json" or charset not in ("utf-8", "utf8"):
        raise Refused(
            415, f"requests are application/json, in UTF-8; got Content-Type {given!r:.80}"
        )


def check_model(name: str, models: ServedModels) -> None:
    """Raises Refused for a model that is not served."""
    if name not in models.routers:
        retired = name.removeprefix(f"{ENSEMBLE}:") in models.retired
        what = f"{name} is retired" if retired else f"there is no model {name[:80]!r}"
        message = f"{what}; there are: {', '.join(models.routers)}"
        raise Refused(404, message, "model", "model_not_found")
