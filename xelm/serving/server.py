"""A server from beginning to end: what it offers, whether that has changed, how it stops."""

import contextlib
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from clustering.errors import UserError
from experts.registry import FILE_NAME
from xelm.inference.engine import Engine
from xelm.inference.routing import Routing
from xelm.inference.sampling_params import GREEDY
from xelm.process import open_files
from xelm.runs.ensembles import check_top_m, published
from xelm.runs.run import Run
from xelm.serving.app import make_app
from xelm.serving.connections import limited
from xelm.serving.desk import Desk
from xelm.serving.limits import IDLE_SECONDS, MOST_HEAD_BYTES, Limits
from xelm.serving.metrics import Metrics
from xelm.serving.offer import Offer, open_offer
from xelm.serving.origins import LOOPBACK, check_origins

KEY = "XELM_API_KEY"
"""The environment's variable with the API key."""
LOOK_SECONDS, LONGEST_WAIT = 2.0, 60.0
"""From one look at the registry to the next; at most, from one refusal of it to the next try."""
FILES = 512
"""Open files that are not connections, at most."""


def serve(
    run: Run,
    routing: Routing,
    *,
    dtype: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    key_file: str | Path | None = None,
    origins: Sequence[str] = (),
    limits: Limits | None = None,
) -> None:
    """Serves a RUN until it is asked to stop (SIGTERM, SIGINT), and then until all that runs is
    done. port: 0 takes a free one. key_file: holds the API key; None takes it from the environment,
    where there may be none. origins: web pages elsewhere that may send requests (CORS)."""
    limits, key = limits or Limits(), read_key(key_file)
    check_origins(origins, key=key is not None)
    check_top_m(routing.top_m, len(published(run)))
    listening = _listening(host, port)
    with listening:
        # A page elsewhere may have a name of its own resolved to this machine: without a key only
        # the names of loopback are answered.
        local = _is_loopback(host)
        hosts = (*LOOPBACK, host) if local and key is None else None
        opener = partial(open_offer, run, routing, dtype=dtype)
        print(f"preparing {run.directory}", file=sys.stderr, flush=True)
        app, desk, watch = assemble(
            opener, run.directory / FILE_NAME, limits, key=key, hosts=hosts, origins=origins
        )
        _warm(desk.offer)
        desk.start()
        watch.start()
        # Its own way of setting this up would close what other handlers write to.
        log = logging.getLogger("uvicorn")
        log.addHandler(logging.StreamHandler())
        log.propagate = False
        # Warns where several pieces are written at once to a client that has just left.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        server = http_server(app, limits)

        def stop(*_: object) -> None:
            server.should_exit = True

        # Before it runs, and after: when it has stopped, the server sends itself the signal that
        # asked it to.
        before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        print(f"serving {', '.join(desk.offer.routers)}", file=sys.stderr)
        if not local and key is None:
            print(
                f"WARNING: whoever reaches this machine may ask; set {KEY} or --api-key-file",
                file=sys.stderr,
            )
        print(f"listening on {address}", file=sys.stderr, flush=True)
        try:
            server.run(sockets=[listening])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            watch.stop()
            desk.close()
    print("stopped", file=sys.stderr)


def http_server(app: Starlette, limits: Limits) -> uvicorn.Server:
    """uvicorn with our limits of connections; nothing of it is logged but faults of the server."""
    # Some files are always open: the RUN's, and those of the libraries.
    most = max(1, min(limits.connections, open_files() - FILES))
    return uvicorn.Server(
        uvicorn.Config(
            app,
            # The same wherever this is installed, whatever else is.
            loop="asyncio",
            http=limited(most, limits.connections_per_client),
            ws="none",
            h11_max_incomplete_event_size=MOST_HEAD_BYTES,
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            # So many are accepted at once before the limits are looked at.
            backlog=128,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=int(limits.seconds) + 10,
        )
    )


def assemble(
    opener: Callable[..., Offer],
    registry: Path,
    limits: Limits,
    *,
    key: str | None = None,
    hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
) -> tuple[Starlette, Desk, "Watch"]:
    """The parts of a server, none of which runs yet. opener: opens what the registry speaks of,
    given what was offered `before`. key, hosts, origins: as `make_app` has them."""
    seen = _state(registry)

    def post(call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and all who waited with it
            app.state.loop.call_soon_threadsafe(call)

    desk = Desk(opener(), most_texts=limits.texts, most_waiting=limits.waiting, post=post)
    metrics = Metrics(desk)
    app = make_app(desk, metrics, limits, key=key, hosts=hosts, origins=origins)
    return app, desk, Watch(registry, seen, opener, desk, metrics)


State = tuple[int, int, int] | None
"""Of a file: what changes when it does; None where there is none."""


def _state(file: Path) -> State:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class Watch(threading.Thread):
    """Looks whether experts were published, rolled back or grown, and has them offered."""

    def __init__(
        self,
        registry: Path,
        seen: State,
        opener: Callable[..., Offer],
        desk: Desk,
        metrics: Metrics,
    ):
        """registry: the file. seen: its state before it was read. opener: as `assemble` has it."""
        super().__init__(name="watch", daemon=True)
        self._registry, self._opener, self._desk, self._metrics = registry, opener, desk, metrics
        self._stopped = threading.Event()
        self._seen, self._again, self._wait, self._refusal = seen, math.inf, LOOK_SECONDS, ""

    def run(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """Has what changed taken up, or refuses it in a line and leaves all as it was."""
        state = _state(self._registry)
        if state == self._seen and time.monotonic() < self._again:
            return
        before, began = self._desk.offer, time.monotonic()
        if state != self._seen:
            # No request waits for it, but it may take a while: routers are fitted to new experts.
            print("the registry has changed: preparing what it has", file=sys.stderr, flush=True)
        self._seen, self._again = state, math.inf
        self._desk.preparing = True
        try:
            offer = self._opener(before=before)
        except Exception as error:
            # What is not there yet may come.
            self._wait = min(2 * self._wait, LONGEST_WAIT)
            self._again = time.monotonic() + self._wait
            what = str(error) if isinstance(error, UserError) else repr(error)
            if what != self._refusal:
                print(f"the changed registry is refused: {what}", file=sys.stderr, flush=True)
                self._metrics.reloaded("refused")
            self._refusal = what
            return
        finally:
            self._desk.preparing = False
        self._refusal, self._wait = "", LOOK_SECONDS
        if offer.versions == before.versions:
            return
        self._desk.exchange(offer)
        self._metrics.reloaded("taken up")
        seconds = time.monotonic() - began
        what = ", ".join(offer.versions.values())
        print(f"now serving {what}; prepared in {seconds:.1f} s", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Looks no more."""
        self._stopped.set()
        self.join()


def read_key(file: str | Path | None) -> str | None:
    """The API key from a file or the environment; UserError for one that is empty."""
    if file is None:
        key, where = os.environ.get(KEY), KEY
        if key is None:
            return None
    else:
        key, where = Path(file).read_text(encoding="utf-8"), str(file)
    if not key.strip():
        raise UserError(f"{where} holds no API key: it is empty")
    if not key.strip().isascii():
        raise UserError(f"the API key of {where} has characters that no header can: use ASCII")
    return key.strip()


def _listening(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise UserError(f"a port is between 0 and 65535; got {port}")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _warm(offer: Offer) -> None:
    """Compiles what the first request would wait for."""
    router = list(offer.routers.values())[1]
    engine = Engine(offer.ensemble, router, offer.ensemble.limits)
    engine.add([offer.ensemble.tokenizer.prefix_id] * 2, GREEDY)
    for _ in range(2):
        engine.step()
