"""Checks of where requests come from: host names, and web pages of other origins."""

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from clustering.errors import UserError
from xelm.serving.errors import Refused, error_body

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Host names of this machine."""


class KnownHosts:
    """Middleware that refuses requests whose Host is none of some names. (A web page elsewhere may
    have its own name resolved to this machine; the browser would then let it send requests.)"""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]):
        self._app, self._hosts = app, frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = Headers(scope=scope).get("host", "")
            if _name(given) not in self._hosts:
                refused = Refused(400, f"this server does not answer under the host {given!r:.80}")
                await refused.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _name(host: str) -> str | None:
    """The name in a Host header without the port; None for an invalid header."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


class CrossOrigin(CORSMiddleware):
    """Middleware that lets web pages of some origins send requests (CORS)."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]):
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            # Clients add headers of their own, as OpenAI's for JavaScript does. Only the origin is
            # checked: there are no cookies to protect.
            allow_headers=("*",),
            # Browsers ask for this before a public page may use a server on the same machine.
            allow_private_network=True,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code == 200:
            return answer
        body = error_body(bytes(answer.body).decode(), answer.status_code)
        return JSONResponse(body, answer.status_code, headers={"Vary": "Origin"})


def check_origins(origins: Sequence[str], *, key: bool) -> None:
    """Raises UserError for an invalid origin, and for "*" (every web page) without an API key."""
    for origin in origins:
        if origin == "*":
            if not key:
                raise UserError(
                    "--cors-origin '*' lets every web page use this server; give it an API key, or "
                    "name the origins"
                )
            continue
        parts = urlsplit(origin)
        if origin != f"{parts.scheme}://{parts.netloc}" or not parts.netloc:
            raise UserError(
                "an origin is a scheme and a host, such as https://example.org or "
                f"http://localhost:3000; got {origin!r}"
            )
