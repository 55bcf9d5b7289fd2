"""The server's interface over HTTP: its paths, who may use them, and what is beside completions."""

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
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from xelm.serving import metrics as prometheus
from xelm.serving.completions import Completions, check_model
from xelm.serving.connections import HEALTH, RefusesCrowds, RefusesLongHeads
from xelm.serving.desk import Desk
from xelm.serving.errors import Refused, of_routes, of_server
from xelm.serving.limits import Limits
from xelm.serving.metrics import Metrics
from xelm.serving.offer import ENSEMBLE, Offer
from xelm.serving.origins import CrossOrigin, KnownHosts
from xelm.serving.requests import ChatRequest, CompletionRequest


def make_app(
    desk: Desk,
    metrics: Metrics,
    limits: Limits,
    *,
    key: str | None = None,
    hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
) -> Starlette:
    """key: the API key that requests must have; None wants none. hosts: host names under which
    requests may come; None allows any. origins: web pages that may send requests (CORS)."""
    interface = _Interface(desk=desk, metrics=metrics, key=key)
    completions = Completions(desk=desk, metrics=metrics, limits=limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.loop = asyncio.get_running_loop()
        yield

    middleware = [Middleware(RefusesCrowds), Middleware(RefusesLongHeads)]
    if hosts:
        middleware.append(Middleware(KnownHosts, hosts=hosts))
    if origins:
        middleware.append(Middleware(CrossOrigin, origins=origins))
    locked = interface.locked

    def answer(kind: type[CompletionRequest] | type[ChatRequest]):
        return locked(functools.partial(completions.answer, kind=kind))

    app = Starlette(
        routes=[
            Route("/", interface.page),
            Route(HEALTH, interface.health),
            Route("/metrics", locked(interface.told)),
            Route("/v1/models", locked(interface.models)),
            Route("/v1/models/{name:path}", locked(interface.model)),
            Route("/v1/completions", answer(CompletionRequest), methods=["POST"]),
            Route("/v1/chat/completions", answer(ChatRequest), methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: of_routes, Exception: of_server},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a path that is not there is answered in JSON
    return app


@dataclass(kw_only=True)
class _Interface:
    desk: Desk
    metrics: Metrics
    key: str | None
    created: int = field(default_factory=lambda: int(time.time()))

    def locked(
        self, endpoint: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint for those who have the key; all faults are answered in JSON."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
            except Refused as refused:
                self.metrics.request("unknown", refused.status)
                return refused.response()
            try:
                return await endpoint(request)
            except Refused as refused:
                return refused.response()
            except Exception as error:
                # Here and not by Starlette, which would answer without the headers of CORS.
                logging.getLogger("uvicorn.error").error("a request failed", exc_info=error)
                return of_server(request, error)

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
        body = {"status": "ok" if alive else "failed", "preparing": self.desk.preparing}
        return JSONResponse(body, 200 if alive else 503)

    async def told(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=prometheus.CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        offer = self.desk.offer
        data = [self._model(name, offer) for name in offer.routers]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        offer, name = self.desk.offer, request.path_params["name"]
        check_model(name, offer)
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
