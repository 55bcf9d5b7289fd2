"""Connections that are kept open for nothing: they end in time, and nobody else has to wait."""

import contextlib
import json
import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from serving import served, until

from xelm.process import open_files
from xelm.serving import connections, limits, openai_completions
from xelm.serving.limits import Limits
from xelm.serving.openai_requests import MOST_ALTERNATIVES, MOST_IDS, MOST_MESSAGES

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HALVES = {
    "nothing": b"",
    "half a head": HEAD,
    "half a body": HEAD + b"Content-Length: 99\r\n\r\n{",
}
# In a process of its own: keeps connections open, each with the beginning of a request, and sends
# one more byte of each now and then.
LORIS = """
import socket, sys, time
port, count, begun = int(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.argv[3])
held = []
for _ in range(count):
    one = socket.create_connection(("127.0.0.1", port))
    one.sendall(begun)
    held.append(one)
print("held", flush=True)
while True:
    time.sleep(0.1)
    for one in held:
        try:
            one.sendall(b"x")
        except OSError:
            pass
"""


def port_of(server):
    return int(server.url.rsplit(":", 1)[1])


def connected(server):
    return socket.create_connection(("127.0.0.1", port_of(server)), timeout=20)


def rest_of(connection):
    """Everything that still comes, until the other side closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(2**16):
            parts.append(part)
    return b"".join(parts)


@contextlib.contextmanager
def loris(server, count, begun):
    command = [sys.executable, "-c", LORIS, str(port_of(server)), str(count), begun.hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield
        finally:
            process.kill()


@pytest.mark.parametrize(
    "begun",
    [
        pytest.param(half, id=name, marks=[] if name == "half a body" else pytest.mark.slow)
        for name, half in HALVES.items()
    ],
)
def test_800_unfinished_requests_keep_nobody_waiting(server, begun):
    with loris(server, 800, begun):
        began = time.monotonic()
        for _ in range(5):
            assert httpx.get(f"{server.url}/healthz", timeout=1).json()["status"] == "ok"
        answer = server.post({"model": "xelm", "prompt": "a", "max_tokens": 1})
        assert answer.status_code == 200
        assert time.monotonic() - began < 20


@pytest.mark.slow
def test_requests_under_way_are_never_closed_for_others(chatty, slow):
    """At the limit the unfinished give way; where all are under way, only health is told."""
    limits = Limits(max_sequences=2, max_waiting=0)
    with served(chatty, limits=limits) as found:
        most = limits.connections_per_client
        streams, body = [], {"model": "xelm:seed", "prompt": "a", "stream": True, "max_tokens": 50}
        body |= {"temperature": 0}  # drawn tokens may end the text at once
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                stream = httpx.stream("POST", f"{found.url}/v1/completions", json=body, timeout=60)
                streams.append(stack.enter_context(stream).iter_lines())
                next(streams[-1])
            for _ in range(most):
                half = stack.enter_context(connected(found))
                half.sendall(HALVES["half a body"])
            refused = found.post({"model": "xelm", "prompt": "a", "max_tokens": 1})
            assert refused.json()["error"]["code"] == "queue_full"  # heard, and both are at work
            assert [list(stream)[-2] for stream in streams] == ["data: [DONE]"] * 2


class Waiting:
    """A connection as `Connections` sees it."""

    def __init__(self, address, waits):
        self.address, self._waits, self.closed = address, waits, False

    def waits_in(self, state):
        return state is self._waits and not self.closed

    def abort(self):
        self.closed = True
        self.group.remove(self)


def test_which_connection_is_closed_and_which_is_refused():
    idle, body = connections.h11.IDLE, connections.h11.SEND_BODY

    def entered(group, *some):
        for one in some:
            one.group = group
        return [group.add(one) for one in some]

    group = connections.Connections(4, 2)
    slow, late, busy = Waiting("a", body), Waiting("a", idle), Waiting("a", None)
    assert entered(group, slow, late, busy) == [None] * 3
    assert late.closed and not slow.closed  # who sent a head goes last
    other = Waiting("b", None)
    assert entered(group, Waiting("a", None), other) == [None, None] and slow.closed
    (why,) = entered(group, Waiting("a", None))
    assert why == (429, "your address has 2 requests in progress already")
    (why,) = entered(group, Waiting("c", None))
    assert why == (503, "4 requests are in progress already")
    group.remove(other)
    assert entered(group, Waiting("c", idle), Waiting("d", idle))[-1] is None


def test_a_head_comes_in_time(server, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    with connected(server) as silent, connected(server) as half:
        half.sendall(HEAD)
        head, _, body = rest_of(half).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408") and b"application/json" in head
        assert "the head of a request must arrive within" in json.loads(body)["error"]["message"]
        assert rest_of(silent) == b""
    # Between two requests of a connection, too.
    with connected(server) as kept:
        kept.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert kept.recv(2**16).startswith(b"HTTP/1.1 200")
        kept.sendall(b"GET /healthz HT")
        assert b"HTTP/1.1 408" in rest_of(kept)


def test_a_body_comes_in_time(server, monkeypatch):
    monkeypatch.setattr(openai_completions, "BODY_SECONDS", 0.2)
    with connected(server) as half:
        half.sendall(HALVES["half a body"])
        found = rest_of(half)
        assert (
            found.startswith(b"HTTP/1.1 408")
            and b"the body of a request must arrive within" in found
        )
    # Where nobody reads the body, its limit is that of the connection.
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(connections, "_GRACE", 0.0)
    with connected(server) as half:
        half.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        assert b"HTTP/1.1 200" in rest_of(half)


def test_whoever_does_not_read_the_answer_is_left(server, monkeypatch):
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.2)
    with connected(server) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(ConnectionError):
            for _ in range(20_000):
                deaf.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert len(rest_of(deaf)) < 20_000 * 8000


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (b"hello\r\n\r\n", 400, "this is not HTTP/1.1: "),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "Missing mandatory Host: header"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000, 431, "the head of a request is too"),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400, "conflicting"),
    ],
    ids=["no HTTP", "no host", "a long head", "two lengths"],
)
def test_what_is_no_request_is_refused_in_json(server, sent, status, message):
    with connected(server) as connection:
        connection.sendall(sent)
        head, _, body = rest_of(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status)
    error = json.loads(body)["error"]
    assert message in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("where", ["header", "many headers", "path"])
def test_a_long_head_that_comes_at_once_is_refused(server, where):
    """In one piece, as it is given to the connection by the system."""
    headers = {"header": {"x": "x" * 100_000}, "path": {}}.get(
        where, {f"x-{n}": "x" * 1000 for n in range(90)}
    )
    path = f"/healthz?{'x' * 100_000}" if where == "path" else "/healthz"
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    protocol = server.http.config.http_protocol_class
    whole, fed = "\r\n".join([*lines, "", ""]).encode(), protocol.data_received
    kept = bytearray()

    def at_once(self, data):
        kept.extend(data)
        if kept.endswith(b"\r\n\r\n"):
            fed(self, bytes(kept))

    with pytest.MonkeyPatch.context() as patch, connected(server) as connection:
        patch.setattr(protocol, "data_received", at_once)
        connection.sendall(whole)
        head, _, body = rest_of(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431")
    assert "the head of a request is too long" in json.loads(body)["error"]["message"]


def test_every_connection_is_counted_out(server):
    group = server.http.config.http_protocol_class.group
    until(lambda: not group._all and not group._by_client)


def test_files_may_be_open_up_to_what_the_system_allows():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    assert open_files() == resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= soft


def test_the_table_of_limits_is_that_of_the_code():
    page = (Path(__file__).parent.parent / "docs/serving.md").read_text(encoding="utf-8")
    table = page.split("### Limits")[1].split("Requests in progress")[0]
    rows = {row.split("|")[1].strip(): row for row in table.splitlines() if row.startswith("|")}
    usual = Limits()
    for name, *values in (
        ("first line and headers of a request", limits.MOST_HEAD_BYTES),
        ("body of a request", limits.MOST_BYTES),
        ("connection between two requests", limits.IDLE_SECONDS),
        ("client that does not read its response", limits.WRITE_SECONDS),
        ("connections of one client address", usual.connections_per_client),
        ("connections of all clients", usual.connections),
        (
            "further connections, answered at `/healthz` and `/readyz` alone",
            connections._HEALTH_CHECKS,
        ),
        ("sequences generated at once", usual.max_sequences),
        ("sequences that wait", usual.max_waiting),
        ("sequences of a request: prompts times `n`", usual.max_sequences + usual.max_waiting),
        ("tokens generated for a sequence", usual.max_tokens),
        ("time of a sequence, waiting included", usual.max_seconds),
        (
            "ids of a prompt, messages of a chat",
            MOST_IDS,
            MOST_MESSAGES,
        ),
        ("alternatives of a token", MOST_ALTERNATIVES),
        ("log probabilities of a request", limits.MOST_LOG_PROBABILITIES),
    ):
        for value in values:
            assert re.search(rf"(?<![\d,]){value:,.0f}(?![\d,]*\d)", rows[name]), (name, value)
    for seconds in (limits.HEAD_SECONDS, limits.BODY_SECONDS):
        assert f"{seconds:.0f} seconds to arrive" in table
