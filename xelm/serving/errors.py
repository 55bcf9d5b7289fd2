"""Refusals of requests: every error is answered in JSON, in the shape of OpenAI's interfaces."""

from collections.abc import Callable, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_CODES = {401: "invalid_api_key", 429: "queue_full"}


class Refused(Exception):
    """Raised for a request that is answered by an error. param: the field of the request that is at
    fault. code: name of the error for programs; None: the usual one of the status. retry_seconds:
    after how many seconds the client should try again; None: 1 for 429, otherwise it is not
    said."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_seconds: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_seconds = 1 if retry_seconds is None and status == 429 else retry_seconds

    def response(self) -> Response:
        """The response to the request."""
        headers = {}
        if self.status == 408:  # the rest of the request is not read
            headers["Connection"] = "close"
        if self.retry_seconds is not None:
            headers["Retry-After"] = str(self.retry_seconds)
        body = error_body(str(self), self.status, self.param, self.code)
        return JSONResponse(body, self.status, headers=headers)


class Checks:
    """Middleware that refuses requests for which one of some checks raises Refused."""

    def __init__(self, app: ASGIApp, checks: Sequence[Callable[[Scope], None]]):
        self._app, self._checks = app, checks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            for check in self._checks if scope["type"] == "http" else ():
                check(scope)
        except Refused as refused:
            await refused.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def error_body(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of a response with an error."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = code or _CODES.get(status)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def routing_error(request: HTTPRequest, error: Exception) -> Response:
    """The response where no route has the path or the method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    body = error_body(what, error.status_code)
    return JSONResponse(body, error.status_code, headers=error.headers)


def server_error(request: HTTPRequest, error: Exception) -> Response:
    """The response where the server itself is at fault."""
    return JSONResponse(error_body("the server failed to answer this request", 500), 500)
