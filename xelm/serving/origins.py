"""Checks of where requests come from: host names, and web pages of other origins."""

import contextlib
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Scope

from clustering.errors import UserError
from xelm.serving.errors import Refused, error_body

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Host names of this machine."""


def check_host(hosts: Sequence[str], scope: Scope) -> None:
    """Raises Refused for a request whose Host is none of some names. (A web page elsewhere may have
    its own name resolved to this machine; the browser would then let it send requests.)"""
    given = Headers(scope=scope).get("host", "")
    name = None
    with contextlib.suppress(ValueError):  # an invalid header
        name = urlsplit(f"//{given}").hostname
    if name not in {host.lower() for host in hosts}:
        raise Refused(400, f"this server does not answer under the host {given!r:.80}")


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
        netloc = ""
        with contextlib.suppress(ValueError):  # such as a bracket that is not closed
            scheme, netloc, *_ = urlsplit(origin)
        if not netloc or origin != f"{scheme}://{netloc}":
            raise UserError(
                "an origin is a scheme and a host, such as https://example.org or "
                f"http://localhost:3000; got {origin!r}"
            )
