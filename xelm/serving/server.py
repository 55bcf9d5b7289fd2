"""A server from start to stop."""

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from clustering.errors import UserError
from experts.registry import FILE_NAME
from xelm.inference.routing import Routing
from xelm.process import open_files
from xelm.runs.ensembles import check_top_m, published
from xelm.runs.run import Run
from xelm.serving.connections import limited_protocol
from xelm.serving.http import make_app
from xelm.serving.limits import IDLE_SECONDS, MOST_HEAD_BYTES, Access, Limits
from xelm.serving.loading import Loading
from xelm.serving.metrics import Metrics
from xelm.serving.models import open_served_models
from xelm.serving.origins import LOOPBACK, check_origins
from xelm.serving.reload import Opener, RegistryWatcher, file_state
from xelm.serving.scheduler import Scheduler

KEY = "XELM_API_KEY"
"""Environment variable with the API key."""
FILES = 512
"""Largest number of open files that are not connections: the RUN's and those of libraries."""


def serve(
    run: Run, routing: Routing, access: Access, limits: Limits, *, dtype: str = "auto"
) -> None:
    """Serves a RUN until SIGTERM or SIGINT, and then until all requests are answered.

    It listens at once, and loads the models meanwhile; an error of loading is raised."""
    key, host = read_key(access.api_key_file), access.host
    check_origins(access.cors_origins, key=key is not None)
    check_top_m(routing.top_m, len(published(run)))
    with _listen(access) as listening:
        local = host in ("localhost", "::1") or host.startswith("127.")
        opener = partial(open_served_models, run, routing, dtype=dtype)
        app, scheduler, watcher = assemble(
            opener,
            run.directory / FILE_NAME,
            limits,
            key=key,
            # A web page elsewhere may have its own name resolved to this machine: without a key
            # requests under such a name are refused.
            hosts=(*LOOPBACK, host) if local and key is None else None,
            origins=access.cors_origins,
        )
        scheduler.start()
        _log_to_stderr()
        server = http_server(app, limits)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        errors: list[Exception] = []

        def loaded(error: Exception | None) -> None:
            if error is None:
                watcher.start()
            else:
                errors.append(error)
                server.should_exit = True

        loading = Loading(opener, scheduler, loaded)
        if not local and key is None:
            warning = f"everyone who can reach {address} can use it; set {KEY} or --api-key-file"
            print(f"WARNING: {warning}", file=sys.stderr)
        try:
            with _stopped_by_signals(server):
                print(f"listening on {address}", file=sys.stderr, flush=True)
                print(f"loading {run.directory}", file=sys.stderr, flush=True)
                loading.start()
                server.run(sockets=[listening])
        finally:
            watcher.stop()
            scheduler.close()
    if errors:
        raise errors[0]
    print("stopped", file=sys.stderr, flush=True)
    if loading.is_alive():
        # What it compiles cannot be interrupted, and may take minutes. Its files are written under
        # other names first, so nothing is left unfinished.
        os._exit(0)


@contextlib.contextmanager
def _stopped_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """SIGTERM and SIGINT end the server, also before it runs and after: when it has stopped, it
    sends itself the signal that stopped it."""

    def stop(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _log_to_stderr() -> None:
    # uvicorn's own configuration would close the streams of other handlers.
    log = logging.getLogger("uvicorn")
    log.addHandler(logging.StreamHandler())
    log.propagate = False
    # asyncio warns where several chunks are written to a client that has just disconnected.
    logging.getLogger("asyncio").setLevel(logging.ERROR)


def http_server(app: Starlette, limits: Limits) -> uvicorn.Server:
    """uvicorn with our limits of connections; it logs only errors of the server."""
    most = max(1, min(limits.connections, open_files() - FILES))
    return uvicorn.Server(
        uvicorn.Config(
            app,
            # The same on every machine, whatever other packages are installed.
            loop="asyncio",
            http=limited_protocol(most, limits.connections_per_client),
            ws="none",
            h11_max_incomplete_event_size=MOST_HEAD_BYTES,
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            # Number of connections that are accepted at once before the limits are checked.
            backlog=128,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=int(limits.max_seconds) + 10,
        )
    )


def assemble(
    opener: Opener,
    registry: Path,
    limits: Limits,
    *,
    key: str | None = None,
    hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
) -> tuple[Starlette, Scheduler, RegistryWatcher]:
    """The parts of a server, none of which runs yet, and without models: until the scheduler has
    some (`Scheduler.replace_models`), requests are refused. opener: opens those that the registry
    lists when that changes. registry: the file that it reads. key, hosts, origins: as in
    `make_app`."""
    seen = file_state(registry)  # before `opener` reads it

    def call_soon(function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and nobody waits
            app.state.loop.call_soon_threadsafe(function)

    scheduler = Scheduler(None, limits, call_soon)
    metrics = Metrics(scheduler)
    app = make_app(scheduler, metrics, limits, key=key, hosts=hosts, origins=origins)
    return app, scheduler, RegistryWatcher(registry, seen, opener, scheduler, metrics)


def read_key(file: str | Path | None) -> str | None:
    """The API key from a file or the environment; UserError for one that is empty."""
    if file is None:
        key, where = os.environ.get(KEY), KEY
        if key is None:
            return None
    else:
        key, where = Path(file).read_text(encoding="utf-8", errors="replace"), str(file)
    key = key.strip()
    if not key:
        raise UserError(f"{where} contains no API key: it is empty")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the API key of {where} has characters that no header can have: use ASCII")
    return key


def _listen(access: Access) -> socket.socket:
    host, port = access.host, access.port
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
