"""`xelm serve` as a process: from start to stop, under load, and what it does not begin."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest

PROMPT = "abc de"


@pytest.mark.slow
def test_the_command_serves_and_stops_in_peace(chatty, tmp_path):
    """From outside: SIGTERM while a request runs, which is answered to its end."""
    environment = {**os.environ, "XELM_API_KEY": "k"}
    command = [sys.executable, "-m", "xelm", "serve", str(chatty), "--port", "0"]
    with subprocess.Popen(
        [*command, "--routing", "uniform"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("serving xelm, xelm:"):  # it is ready
                break
        assert lines[0].startswith("listening on ")
        url = lines[0].split()[-1]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
        stream = client.completions.create(
            model="xelm", prompt=PROMPT, max_tokens=40, stream=True, temperature=0
        )
        first = next(stream)
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason in ("stop", "length")
        assert first.id == rest[-1].id
        assert process.wait(timeout=60) == 0
        assert process.stderr.read().splitlines()[-1] == "stopped"


@pytest.mark.slow
def test_under_load_nothing_is_unexpected(tiny):
    load = Path(__file__).parent.parent / "benchmarks" / "load.py"
    options = ("--clients", "16", "--seconds", "10", "--warm", "15")
    options += ("--characters", "30", "--tokens", "12")
    command = [sys.executable, str(load), str(tiny.directory), str(tiny.held_out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Unexpected: 0" in done.stdout


def test_what_cannot_be_served_is_refused_at_once(xelm, tiny, tmp_path):
    busy = socket.create_server(("127.0.0.1", 0))
    port = busy.getsockname()[1]
    refused = xelm("serve", tiny.directory, "--port", port)
    assert refused.code == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in refused.err
    busy.close()
    for options, message in (
        (("--port", 99999), "a port is between 0 and 65535; got 99999"),
        (("--max-sequences", 0), "max_sequences must be at least 1; got 0"),
        (("--max-seconds", "nan"), "max_seconds must be above 0; got nan"),
        (("--top-m", 9), "top_m must be between 1 and 2 experts; got 9"),
        (("--api-key-file", tmp_path / "none"), "none: No such file or directory"),
    ):
        refused = xelm("serve", tiny.directory, "--port", 0, *options)
        assert refused.code == 2 and message in refused.err
        assert len(refused.err.strip().splitlines()) == 1
    directory = tmp_path / "RUN"
    shutil.copytree(tiny.directory, directory)
    registry = json.loads((directory / "registry.json").read_text())
    registry["experts"] = []
    (directory / "registry.json").write_text(json.dumps(registry))
    refused = xelm("serve", directory, "--port", 0)
    assert refused.code == 2 and "has no published expert yet; run: xelm train" in refused.err
