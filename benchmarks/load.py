"""Load test: `xelm serve` on loopback with many clients at once.

    python benchmarks/load.py RUN TEXT --clients 64 --seconds 60

Each client sends one request after the other, with beginnings of documents in the languages of TEXT
(files LANGUAGE.jsonl); half of them are streamed. One request in ten is abandoned, and one in
twenty is malformed on purpose. Exits with 1 after anything unexpected: another status, a stream
without its end, a place that is not free again, a server that does not stop, or one that needs a
twentieth more memory in the last quarter of the time than in the third.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

CANCELLED, MALFORMED = 0.1, 0.05
BAD = (
    (b"{", 400),
    (b'{"model": "xelm", "prompt": "\xff"}', 400),
    (b'{"model": "nobody", "prompt": "a"}', 404),
    (b'{"model": "xelm", "prompt": "a", "temperature": NaN}', 400),
    (b'{"model": "xelm", "prompt": "a", "max_tokens": 1000000}', 400),
)


@dataclass
class Seen:
    """Results of all clients."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """Seconds to the first text of each stream."""
    between: list[float] = field(default_factory=list)
    """Seconds from one text of a stream to the next."""
    whole: list[float] = field(default_factory=list)
    """Seconds of all requests that were completed."""
    tokens: int = 0


async def client(
    number: int, url: str, prompts: Sequence[str], tokens: int, until: float, seen: Seen
) -> None:
    draw = random.Random(number)
    limits = httpx.Limits(max_connections=1)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        while time.monotonic() < until:
            try:
                await send(http, draw, prompts, tokens, seen)
            except httpx.HTTPError as error:
                seen.faults.append(repr(error))


async def send(
    http: httpx.AsyncClient,
    draw: random.Random,
    prompts: Sequence[str],
    tokens: int,
    seen: Seen,
) -> None:
    """Sends one request: malformed, abandoned, streamed, or answered at once."""
    kind = draw.random()
    if kind < MALFORMED:
        content, wanted = draw.choice(BAD)
        headers = {"content-type": "application/json"}
        answer = await http.post("/v1/completions", content=content, headers=headers)
        seen.counts["malformed"] += 1
        if answer.status_code != wanted:
            seen.faults.append(f"{answer.status_code} instead of {wanted} for {content!r}")
        return
    stream = draw.random() < 0.5
    body = {
        "model": "xelm",
        "prompt": (prompt := draw.choice(prompts))[: draw.randint(5, len(prompt))],
        "max_tokens": draw.randint(4, tokens),
        "stream": stream,
        "stream_options": {"include_usage": True},
    }
    if kind < MALFORMED + CANCELLED:
        await abandon(http, draw, body, seen)
        return
    began = time.monotonic()
    complete = await (receive_stream if stream else receive)(http, body, seen)
    if complete:
        seen.counts["streamed" if stream else "completed"] += 1
        seen.whole.append(time.monotonic() - began)


async def abandon(
    http: httpx.AsyncClient, draw: random.Random, body: dict[str, object], seen: Seen
) -> None:
    """Begins to read a response, and disconnects."""
    seen.counts["abandoned"] += 1
    # By its own connection: one that is abandoned at a bad moment is never free again.
    async with httpx.AsyncClient(base_url=http.base_url, timeout=120) as own:
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(draw.uniform(0.02, 1.0)),
                own.stream("POST", "/v1/completions", json=body) as answer,
            ):
                async for _ in answer.aiter_lines():
                    if draw.random() < 0.1:
                        return


async def receive(http: httpx.AsyncClient, body: dict[str, object], seen: Seen) -> bool:
    """Reads a response that is not streamed; returns whether there is one."""
    answer = await http.post("/v1/completions", json=body)
    if answer.status_code != 200:
        seen.faults.append(f"{answer.status_code}: {answer.text[:200]}")
        return False
    seen.tokens += answer.json()["usage"]["completion_tokens"]
    return True


async def receive_stream(http: httpx.AsyncClient, body: dict[str, object], seen: Seen) -> bool:
    """Reads a stream; returns whether there is one."""
    began = time.monotonic()
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            seen.faults.append(f"{answer.status_code}: {(await answer.aread())[:200]!r}")
            return False
        last, ended = None, ""
        async for line in answer.aiter_lines():
            now = time.monotonic()
            if not line.startswith("data: {"):
                continue
            found = json.loads(line[6:])
            if found.get("choices") and found["choices"][0]["text"]:
                if last is None:
                    seen.first.append(now - began)
                else:
                    seen.between.append(now - last)
                last = now
            usage = found.get("usage")
            seen.tokens += usage["completion_tokens"] if usage else 0
            ended = line
        await asyncio.sleep(0)
    if '"usage"' not in ended:
        seen.faults.append(f"a stream without its end: {ended[:200]}")
    return True


async def watch(process: int, until: float, sizes: list[tuple[float, float]]) -> None:
    """Resident memory of the server, second by second, in MB."""
    began = time.monotonic()
    while time.monotonic() < until:
        sizes.append((time.monotonic() - began, memory(process)))
        await asyncio.sleep(1)


def memory(process: int) -> float:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1000
    raise ValueError("no VmRSS")


async def load(
    url: str, process: int, prompts: Sequence[str], tokens: int, clients: int, seconds: float
) -> tuple[Seen, list[tuple[float, float]]]:
    seen, until, sizes = Seen(), time.monotonic() + seconds, []
    await asyncio.gather(
        watch(process, until, sizes),
        *(client(number, url, prompts, tokens, until, seen) for number in range(clients)),
    )
    return seen, sizes


def served(run: Path, log: Path, *options: str) -> tuple[subprocess.Popen[bytes], str]:
    """A server process and its URL."""
    command = [sys.executable, "-m", "xelm", "serve", str(run), "--port", "0", *options]
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file)
    while process.poll() is None:
        lines = log.read_text().splitlines()
        urls = [line.split()[-1] for line in lines if line.startswith("listening on ")]
        if urls and any(line.startswith("serving ") for line in lines):  # it is ready
            return process, urls[0]
        time.sleep(0.1)
    raise SystemExit(f"the server ended with {process.returncode}: {log.read_text()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warm", type=float, default=30, help="seconds of warming up, not counted")
    parser.add_argument("--routing", default="learned")
    parser.add_argument("--characters", type=int, default=200, help="longest prompt")
    parser.add_argument("--tokens", type=int, default=64, help="most new tokens")
    options = parser.parse_args()
    prompts = [
        json.loads(line)["text"][: options.characters]
        for path in sorted(options.text.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()[:50]
    ]
    log = Path(tempfile.mkdtemp()) / "server.log"
    process, url = served(options.run, log, "--routing", options.routing)
    try:
        warm, _ = asyncio.run(
            load(url, process.pid, prompts, options.tokens, options.clients, options.warm)
        )
        began = time.monotonic()
        seen, sizes = asyncio.run(
            load(url, process.pid, prompts, options.tokens, options.clients, options.seconds)
        )
        took = time.monotonic() - began
        seen.faults += warm.faults
        time.sleep(2)  # the abandoned ones are noticed
        metrics = httpx.get(f"{url}/metrics").text
        for state in ("running", "waiting"):
            if f'xelm_sequences{{state="{state}"}} 0.0' not in metrics:
                seen.faults.append(f"sequences are still {state}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    logged = log.read_text()
    # Earlier lines are about what was loaded and fitted.
    if process.returncode or logged.partition("serving ")[2].splitlines()[1:] != ["stopped"]:
        seen.faults.append(f"the server ended with {process.returncode}: {logged[-500:]}")
    print(f"{options.clients} clients for {took:.0f} s, routing {options.routing}: ", end="")
    report(seen, sizes, took, options.seconds)
    return 1 if seen.faults else 0


def report(seen: Seen, sizes: list[tuple[float, float]], took: float, seconds: float) -> None:
    """Prints the results; memory that still grows is a fault."""
    print(", ".join(f"{count} {what}" for what, count in sorted(seen.counts.items())))
    print(f"{seen.tokens / took:.0f} tokens/s, {len(seen.whole) / took:.1f} requests/s\n")
    print("| seconds | p50 | p95 | p99 |\n|---|---|---|---|")
    for name, values in (
        ("to the first text", seen.first),
        ("between texts of a stream", seen.between),
        ("to the end", seen.whole),
    ):
        points = np.percentile(values, [50, 95, 99])
        print(f"| {name} | " + " | ".join(f"{point:.3f}" for point in points) + " |")
    quarters: list[float] = [0.0] * 4
    for second, size in sizes:
        quarter = min(3, int(4 * second / seconds))
        quarters[quarter] = max(quarters[quarter], size)
    if quarters[2] and quarters[3] > 1.05 * quarters[2]:
        seen.faults.append("memory still grows")
    largest = ", ".join(f"{size:.0f}" for size in quarters)
    print(f"\nMemory of the server, the most in each quarter of the time: {largest} MB.")
    print(f"Unexpected: {len(seen.faults)}")
    for fault, count in Counter(seen.faults).most_common(10):
        print(f"  {count} x {fault}")


if __name__ == "__main__":
    sys.exit(main())
