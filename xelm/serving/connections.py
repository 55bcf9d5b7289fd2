"""Connections that may not be kept open for nothing: time limits, and limits of how many there are.

uvicorn waits without end for the rest of a request. Here the head, the body and the reading of the
answer have time limits, each client address may have so many connections, and all together so many.
When there are too many, the one that has waited longest for the rest of its request is closed, so
that a new client, such as a health check, is always heard.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import Iterable
from typing import Any

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from xelm.serving.errors import Refused, problem
from xelm.serving.limits import BODY_SECONDS, HEAD_SECONDS, MOST_HEAD_BYTES, WRITE_SECONDS

CROWDED = "crowded"
"""Key of a request's state: with what status and why it is refused, unless it asks for `HEALTH`."""
HEALTH = "/healthz"
"""The path that is answered however many connections there are."""
_GRACE = 5.0
"""Seconds after its own limit of a body within which the application has answered 408."""
_HEALTH_CHECKS = 64
"""Connections beyond all limits, of clients who may only ask how the server is."""


class Connections:
    """All connections of a server, by client address."""

    def __init__(self, most: int, most_per_client: int):
        self._most, self._most_per_client = most, most_per_client
        self._by_client: dict[str, dict[Connection, None]] = {}
        self._all: dict[Connection, None] = {}
        """In the order in which they came to wait for a request."""

    def enter(self, connection: "Connection") -> tuple[int, str] | None:
        """Takes a connection in; where there are too many another one is closed. Returns with what
        status and why requests of the new one are to be refused, if nothing could be closed."""
        own = self._by_client.setdefault(connection.address, {})
        why = None
        if len(own) >= self._most_per_client and not _close_one(own):
            why = 429, f"your address has {self._most_per_client} requests under way already"
        elif len(self._all) >= self._most and not _close_one(self._all):
            why = 503, f"{self._most} requests are under way already"
        if why is not None and len(self._all) >= self._most + _HEALTH_CHECKS:
            connection.abort()
        own[connection] = self._all[connection] = None
        return why

    def waits(self, connection: "Connection") -> None:
        """The connection waits for a request from now on: others are closed before it."""
        for some in (self._all, self._by_client.get(connection.address, {})):
            if connection in some:
                some[connection] = some.pop(connection)

    def leave(self, connection: "Connection") -> None:
        """Takes a connection out."""
        self._all.pop(connection, None)
        own = self._by_client.get(connection.address, {})
        own.pop(connection, None)
        if not own:
            self._by_client.pop(connection.address, None)


def _close_one(connections: Iterable["Connection"]) -> bool:
    """Closes the connection that has waited longest for the rest of a request; whether there is
    one. Those that have sent no whole head go before those that lack a part of the body."""
    for state in (h11.IDLE, h11.SEND_BODY):
        for connection in connections:
            if connection.waits_in(state):
                connection.abort()
                return True
    return False


class Connection(H11Protocol):
    """A connection over HTTP/1.1 with time limits; made by uvicorn, one for each."""

    group: Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self._deadline: asyncio.TimerHandle | None = None
        self._awaited: Any = None
        self._write_deadline: asyncio.TimerHandle | None = None
        why = self.group.enter(self)
        if why is not None:
            self.app_state = {**self.app_state, CROWDED: why}
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end()

    def abort(self) -> None:
        """Closes the connection at once, whatever is under way."""
        self._end()
        self.transport.abort()

    def waits_in(self, state: Any) -> bool:
        """Whether the client has still to send what follows this state of h11."""
        return self.conn.their_state is state and not self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.group.waits(self)
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline = self.loop.call_later(WRITE_SECONDS, self.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _watch(self) -> None:
        """Sets the time limit of what the client has to send next; one that runs goes on."""
        state = self.conn.their_state
        state = state if state in (h11.IDLE, h11.SEND_BODY) else None
        if state is self._awaited:
            return
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._awaited = None if self.transport.is_closing() else state
        if self._awaited is h11.IDLE:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._head_is_late)
        elif self._awaited is h11.SEND_BODY:
            # The application gives a reason; this is for what it does not read.
            self._deadline = self.loop.call_later(BODY_SECONDS + _GRACE, self.abort)

    def _head_is_late(self) -> None:
        begun = bool(self.conn.trailing_data[0])
        if begun:
            self._refuse(408, f"the head of a request comes within {HEAD_SECONDS:g} seconds")
        else:
            self.abort()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no request; uvicorn calls it while it handles the fault."""
        fault = sys.exception()
        status = getattr(fault, "error_status_hint", 400)
        what = "the head of a request is too long" if status == 431 else "this is not HTTP/1.1"
        self._refuse(status, f"{what}: {fault or msg}")

    def _refuse(self, status: int, message: str) -> None:
        """Answers with an error in JSON, where no answer has begun, and closes."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(problem(message, status)).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            reason = STATUS_PHRASES.get(status, b"")
            with contextlib.suppress(h11.LocalProtocolError):
                for event in (
                    h11.Response(status_code=status, headers=headers, reason=reason),
                    h11.Data(data=body),
                    h11.EndOfMessage(),
                ):
                    self.transport.write(self.conn.send(event) or b"")
        self._end()
        self.transport.close()

    def _end(self) -> None:
        self.group.leave(self)
        for timer in (self._deadline, self._write_deadline):
            if timer is not None:
                timer.cancel()
        self._deadline = self._write_deadline = None


class RefusesCrowds:
    """Refuses requests of connections for which there was no room, except health checks."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        why = scope.get("state", {}).get(CROWDED)
        if why is not None and scope["path"] != HEALTH:
            await Refused(*why, code="too_many_connections").response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


class RefusesLongHeads:
    """Refuses requests whose head is too long. h11 looks at the length only while a part of the
    head has yet to come: one that comes at once passes."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            line = len(scope["method"]) + len(scope["raw_path"]) + len(scope["query_string"])
            size = line + sum(len(name) + len(value) + 4 for name, value in scope["headers"])
            if size > MOST_HEAD_BYTES:
                what = f"the head of a request is too long: {size:,} bytes, of {MOST_HEAD_BYTES:,}"
                await Refused(431, what).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def limited(most: int, most_per_client: int) -> type[Connection]:
    """The protocol of one server, for uvicorn's `http`."""
    connections = Connections(most, most_per_client)
    return type("LimitedConnection", (Connection,), {"group": connections})
