"""Time limits of connections, and limits of how many there are.

uvicorn waits without limit for the rest of a request. Here the head, the body and the reading of
the response have time limits, and the numbers of connections of one client address and of all are
limited. Where there are too many, the connection that has waited longest for the rest of its
request is closed, so that a new client, such as a health check, is always answered.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import Iterable
from typing import Any

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from xelm.serving.errors import Refused, error_body
from xelm.serving.limits import BODY_SECONDS, HEAD_SECONDS, MOST_HEAD_BYTES, WRITE_SECONDS

REFUSAL = "refusal"
"""Key of the ASGI state: status and message with which all requests of a connection except those of
`HEALTH` and `READY` are refused."""
HEALTH, READY = "/healthz", "/readyz"
"""The paths that are answered however many connections there are."""
_GRACE = 5.0
"""Seconds beyond the limit of a body within which the application answers 408."""
_HEALTH_CHECKS = 64
"""Number of connections beyond all limits that are accepted for health checks alone."""


class Connections:
    """All connections of a server, by client address."""

    def __init__(self, most: int, most_per_client: int):
        self._most, self._most_per_client = most, most_per_client
        self._by_client: dict[str, dict[Connection, None]] = {}
        self._all: dict[Connection, None] = {}
        """Connections in the order in which they began to wait for a request."""

    def add(self, connection: "Connection") -> tuple[int, str] | None:
        """Adds a connection; where there are too many, another one is closed. If none can be
        closed, returns the status and message with which the new one's requests are refused."""
        own = self._by_client.setdefault(connection.address, {})
        refusal = None
        if len(own) >= self._most_per_client and not _close_one(own):
            refusal = 429, f"your address has {self._most_per_client} requests in progress already"
        elif len(self._all) >= self._most and not _close_one(self._all):
            refusal = 503, f"{self._most} requests are in progress already"
        if refusal is not None and len(self._all) >= self._most + _HEALTH_CHECKS:
            connection.abort()
        own[connection] = self._all[connection] = None
        return refusal

    def wait(self, connection: "Connection") -> None:
        """Marks that a connection waits for a request from now on, behind all others."""
        for some in (self._all, self._by_client.get(connection.address, {})):
            if connection in some:
                some[connection] = some.pop(connection)

    def remove(self, connection: "Connection") -> None:
        """Removes a connection."""
        self._all.pop(connection, None)
        own = self._by_client.get(connection.address, {})
        own.pop(connection, None)
        if not own:
            self._by_client.pop(connection.address, None)


def _close_one(connections: Iterable["Connection"]) -> bool:
    """Closes the connection that has waited longest for the rest of a request; returns whether
    there is one. Those without a complete head go before those without a complete body."""
    for state in (h11.IDLE, h11.SEND_BODY):
        for connection in connections:
            if connection.waits_in(state):
                connection.abort()
                return True
    return False


class Connection(H11Protocol):
    """Connection over HTTP/1.1 with time limits; uvicorn makes one for each client."""

    group: Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self._deadline: asyncio.TimerHandle | None = None
        self._awaited: Any = None
        self._write_deadline: asyncio.TimerHandle | None = None
        refusal = self.group.add(self)
        if refusal is not None:
            self.app_state = {**self.app_state, REFUSAL: refusal}
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end()

    def abort(self) -> None:
        """Closes the connection at once, even within a response."""
        self._end()
        self.transport.abort()

    def waits_in(self, state: Any) -> bool:
        """Whether the client has yet to send what follows this state of h11."""
        return self.conn.their_state is state and not self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._set_deadline()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.group.wait(self)
        self._set_deadline()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline = self.loop.call_later(WRITE_SECONDS, self.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _set_deadline(self) -> None:
        """Sets the time limit of what the client has to send next; a running one is kept."""
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
            # The application answers 408; this is for bodies that it does not read.
            self._deadline = self.loop.call_later(BODY_SECONDS + _GRACE, self.abort)

    def _head_is_late(self) -> None:
        if self.conn.trailing_data[0]:  # a part of the head has arrived
            self._refuse(408, f"the head of a request must arrive within {HEAD_SECONDS:g} seconds")
        else:
            self.abort()

    def send_400_response(self, msg: str) -> None:
        """Refuses an invalid request; uvicorn calls it while it handles the error."""
        fault = sys.exception()
        status = getattr(fault, "error_status_hint", 400)
        what = "the head of a request is too long" if status == 431 else "this is not HTTP/1.1"
        self._refuse(status, f"{what}: {fault or msg}")

    def _refuse(self, status: int, message: str) -> None:
        """Answers with an error in JSON, unless a response has begun, and closes."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error_body(message, status)).encode()
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
        self.group.remove(self)
        for timer in (self._deadline, self._write_deadline):
            if timer is not None:
                timer.cancel()
        self._deadline = self._write_deadline = None


def check_connection(scope: Scope) -> None:
    """Raises Refused for a request of a connection beyond the limits, unless it checks health."""
    refusal = scope.get("state", {}).get(REFUSAL)
    if refusal is not None and scope["path"] not in (HEALTH, READY):
        raise Refused(*refusal, code="too_many_connections")


def check_head(scope: Scope) -> None:
    """Raises Refused for a request whose head is too long. (h11 checks the length only while a part
    of the head is missing: a head that arrives at once passes it.)"""
    line = len(scope["method"]) + len(scope["raw_path"]) + len(scope["query_string"])
    size = line + sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    if size > MOST_HEAD_BYTES:
        what = f"the head of a request is too long: {size:,} bytes, of {MOST_HEAD_BYTES:,}"
        raise Refused(431, what)


def limited_protocol(most: int, most_per_client: int) -> type[Connection]:
    """The protocol class of one server, for uvicorn's `http`."""
    connections = Connections(most, most_per_client)
    return type("LimitedConnection", (Connection,), {"group": connections})
