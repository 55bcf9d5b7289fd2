"""A server in a thread of the tests."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import openai
import uvicorn

from xelm import open_run
from xelm.inference.routing import Routing
from xelm.serving.limits import Limits
from xelm.serving.models import open_served_models
from xelm.serving.reload import RegistryWatcher
from xelm.serving.scheduler import Scheduler
from xelm.serving.server import assemble, http_server


@dataclass(frozen=True)
class Served:
    """Where it listens, and its parts."""

    url: str
    scheduler: Scheduler
    watcher: RegistryWatcher
    http: uvicorn.Server

    def client(self, key="unused", **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def post(self, body, path="/v1/completions", **options):
        given = {"content": body} if isinstance(body, bytes) else {"json": body}
        headers = {"content-type": "application/json", **options.pop("headers", {})}
        return httpx.post(self.url + path, headers=headers, timeout=60, **given, **options)


@contextlib.contextmanager
def served(
    directory: Path,
    routing: str = "detected",
    *,
    limits: Limits | None = None,
    loaded: bool = True,
    **options,
) -> Iterator[Served]:
    """loaded: whether the server has models from the start."""
    run = open_run(directory)
    opener = partial(open_served_models, run, Routing(name=routing))
    limits = limits or Limits()
    app, scheduler, watcher = assemble(opener, directory / "registry.json", limits, **options)
    if loaded:
        scheduler.replace_models(opener())
    scheduler.start()
    listening = socket.create_server(("127.0.0.1", 0))
    server = http_server(app, limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    for _ in range(500):
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{url}/healthz").raise_for_status()
            break
        time.sleep(0.02)
    try:
        yield Served(url, scheduler, watcher, server)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        scheduler.close()
        listening.close()
        assert not thread.is_alive()


def until(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
