"""How requests are refused: every fault is answered in JSON, as OpenAI's interfaces have it."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_CODES = {401: "invalid_api_key", 429: "queue_full"}


class Refused(Exception):
    """A request that is answered by an error. param: the field of the request that is at fault.
    code: a name of the fault for programs; None is the usual one of the status."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def response(self) -> Response:
        """The answer to the request."""
        # The rest of a request that was late is not waited for.
        headers = {429: {"Retry-After": "1"}, 408: {"Connection": "close"}}.get(self.status)
        body = problem(str(self), self.status, self.param, self.code)
        return JSONResponse(body, self.status, headers=headers)


def problem(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = code or _CODES.get(status)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def of_routes(request: Request, error: Exception) -> Response:
    """The answer where no route has the path or the method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(problem(what, error.status_code), error.status_code, headers=error.headers)


def of_server(request: Request, error: Exception) -> Response:
    """The answer where the server itself is at fault."""
    return JSONResponse(problem("the server failed at this request", 500), 500)
