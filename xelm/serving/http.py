"""The server's paths over HTTP, who may use them, and the endpoints that generate no text."""

import asyncio
import functools
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from xelm.serving import metrics as prometheus
from xelm.serving.connections import HEALTH, READY, check_connection, check_head
from xelm.serving.errors import Checks, Refused, routing_error, server_error
from xelm.serving.limits import Limits
from xelm.serving.metrics import Metrics
from xelm.serving.models import ENSEMBLE, ServedModels
from xelm.serving.openai_completions import Completions, check_model
from xelm.serving.openai_requests import ChatRequest, CompletionRequest
from xelm.serving.origins import CrossOrigin, check_host
from xelm.serving.scheduler import Scheduler

RETRY_SECONDS = 2
"""Seconds after which a client should try again that a server refused before it was ready."""


def make_app(
    scheduler: Scheduler,
    metrics: Metrics,
    limits: Limits,
    *,
    key: str | None = None,
    hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
) -> Starlette:
    """The ASGI application. key: API key that requests must have, if any. hosts: host names under
    which requests may come; None: any. origins: web pages that may send requests (CORS)."""
    endpoints = _Endpoints(scheduler=scheduler, metrics=metrics, key=key)
    completions = Completions(scheduler=scheduler, metrics=metrics, limits=limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.loop = asyncio.get_running_loop()
        yield

    checks = [check_connection, check_head]
    if hosts:
        checks.append(functools.partial(check_host, hosts))
    middleware = [Middleware(Checks, checks=checks)]
    if origins:
        middleware.append(Middleware(CrossOrigin, origins=origins))
    guarded = endpoints.guarded

    complete = guarded(functools.partial(completions.respond, kind=CompletionRequest))
    chat = guarded(functools.partial(completions.respond, kind=ChatRequest))
    app = Starlette(
        routes=[
            Route("/", endpoints.page),
            Route(HEALTH, endpoints.health),
            Route(READY, endpoints.ready),
            Route("/metrics", guarded(endpoints.prometheus)),
            Route("/v1/models", guarded(endpoints.models)),
            Route("/v1/models/{name:path}", guarded(endpoints.model)),
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: routing_error, Exception: server_error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # an unknown path is answered by an error in JSON
    return app


@dataclass(kw_only=True)
class _Endpoints:
    """The endpoints that generate no text."""

    scheduler: Scheduler
    metrics: Metrics
    key: str | None
    created: int = field(default_factory=lambda: int(time.time()))

    def guarded(
        self, endpoint: Callable[[HTTPRequest], Awaitable[Response]]
    ) -> Callable[[HTTPRequest], Awaitable[Response]]:
        """An endpoint that requires the API key, and answers every error in JSON."""

        async def respond(request: HTTPRequest) -> Response:
            try:
                self._check_key(request)
            except Refused as refused:
                self.metrics.request("unknown", refused.status)
                return refused.response()
            try:
                self._check_ready()
                return await endpoint(request)
            except Refused as refused:
                return refused.response()
            except Exception as error:
                # Here and not by Starlette, which would answer without the headers of CORS.
                logging.getLogger("uvicorn.error").error("a request failed", exc_info=error)
                return server_error(request, error)

        return respond

    def _check_ready(self) -> None:
        if not self.scheduler.ready:
            message = f"the server is not ready yet ({self.scheduler.stage}); try again later"
            raise Refused(503, message, code="not_ready", retry_seconds=RETRY_SECONDS)

    def _check_key(self, request: HTTPRequest) -> None:
        if self.key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self.key.encode())
        if kind.lower() != "bearer" or not same:
            raise Refused(401, "this server requires its API key: Authorization: Bearer KEY")

    async def page(self, request: HTTPRequest) -> Response:
        text = files("xelm.serving").joinpath("page.html").read_text(encoding="utf-8")
        rules = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        rules += "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
        return HTMLResponse(text, headers={"Content-Security-Policy": rules})

    async def health(self, request: HTTPRequest) -> Response:
        alive = self.scheduler.alive
        preparing = self.scheduler.preparing or not self.scheduler.ready
        body = {"status": "ok" if alive else "failed", "preparing": preparing}
        return JSONResponse(body, 200 if alive else 503)

    async def ready(self, request: HTTPRequest) -> Response:
        if not self.scheduler.alive:
            return JSONResponse({"status": "failed"}, 503)
        if self.scheduler.ready:
            return JSONResponse({"status": "ready"})
        retry = {"Retry-After": str(RETRY_SECONDS)}
        return JSONResponse({"status": self.scheduler.stage}, 503, headers=retry)

    async def prometheus(self, request: HTTPRequest) -> Response:
        return Response(self.metrics.text(), media_type=prometheus.CONTENT_TYPE)

    async def models(self, request: HTTPRequest) -> Response:
        models = self.scheduler.models
        data = [self._model(name, models) for name in models.routers]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: HTTPRequest) -> Response:
        models, name = self.scheduler.models, request.path_params["name"]
        check_model(name, models)
        return JSONResponse(self._model(name, models))

    def _model(self, name: str, models: ServedModels) -> dict[str, Any]:
        found: dict[str, Any] = {"id": name, "object": "model"}
        found |= {"created": self.created, "owned_by": "xelm"}
        version = models.versions.get(name.removeprefix(f"{ENSEMBLE}:"))
        if name == ENSEMBLE:
            found["experts"] = dict(models.versions)
        elif version is not None:
            found["version"] = version
        return found
