"""A server from its first second: it listens, says how far it is, refuses until it is ready, and
compiles nothing at its second start."""

import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from functools import partial

import httpx
import openai
import pytest
from serving import served, until

from clustering.errors import UserError
from xelm import open_run
from xelm.inference.routing import Routing
from xelm.process import drop_damaged_programs
from xelm.serving.loading import Loading
from xelm.serving.models import open_served_models

BODY = {"model": "xelm", "prompt": "abc de", "max_tokens": 2}


def test_before_it_is_ready_a_server_says_how_far_it_is_and_refuses_with_a_time(chatty):
    opener = partial(open_served_models, open_run(chatty), Routing(name="uniform"))
    with served(chatty, "uniform", key="k", loaded=False) as found:
        go_on, said, ends = threading.Event(), threading.Event(), []

        def held(report):
            report("expert 3 of 8")
            said.set()
            assert go_on.wait(60)
            return opener(report=report)

        Loading(held, found.scheduler, ends.append).start()
        assert said.wait(60)
        alive, ready = (httpx.get(f"{found.url}/{path}") for path in ("healthz", "readyz"))
        assert alive.status_code == 200 and alive.json() == {"status": "ok", "preparing": True}
        assert ready.status_code == 503 and ready.json() == {"status": "loading: expert 3 of 8"}
        assert ready.headers["retry-after"] == "2"
        key = {"authorization": "Bearer k"}
        refused = found.post(BODY, headers=key)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "2"
        assert refused.json()["error"] == {
            "message": "the server is not ready yet (loading: expert 3 of 8); try again later",
            "type": "server_error",
            "param": None,
            "code": "not_ready",
        }
        assert httpx.get(f"{found.url}/v1/models", headers=key).status_code == 503
        assert found.post(BODY).status_code == 401
        # OpenAI's client obeys: its request is answered as soon as the server is ready.
        client = openai.OpenAI(base_url=f"{found.url}/v1", api_key="k", max_retries=20)
        threading.Timer(0.5, go_on.set).start()
        answer = client.completions.create(**BODY)
        assert answer.usage.completion_tokens == 2
        assert ends == [None]
        assert httpx.get(f"{found.url}/readyz").json() == {"status": "ready"}
        assert httpx.get(f"{found.url}/healthz").json()["preparing"] is False


def test_each_model_whose_files_are_read_is_named(chatty, tmp_path):
    seen = []
    (chatty / ".locks" / "checked.json").unlink(missing_ok=True)
    open_served_models(open_run(chatty), Routing(name="uniform"), report=seen.append)
    experts = [stage for stage in seen if stage.startswith("expert")]
    assert list(dict.fromkeys(experts)) == ["expert 1 of 2", "expert 2 of 2"]
    assert seen[-1] == "routers" and "seed" in seen


def test_an_error_of_loading_is_handed_on(chatty):
    with served(chatty, "uniform", loaded=False) as found:
        ends = []

        def failing(report):
            raise UserError("the weights are damaged")

        Loading(failing, found.scheduler, ends.append).start()
        until(lambda: ends)
        assert isinstance(ends[0], UserError) and not found.scheduler.ready


def started(directory, *options, **environment):
    command = [sys.executable, "-m", "xelm", "serve", str(directory), "--port", "0", *options]
    own = {name: value for name, value in os.environ.items() if not name.startswith("JAX_PERSIST")}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**own, **environment})


def lines_until(process, begin):
    lines = []
    for line in process.stderr:
        lines.append(line.strip())
        if line.startswith(begin):
            break
    return lines


@pytest.mark.slow
def test_a_server_that_is_stopped_or_fails_while_it_loads_ends_at_once(chatty, tmp_path):
    with started(chatty, "--routing", "uniform") as process:
        lines_until(process, "loading ")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert process.stderr.read().splitlines()[-1] == "stopped"
    broken = tmp_path / "RUN"
    subprocess.run(["cp", "-r", str(chatty), str(broken)], check=True)
    registry = json.loads((broken / "registry.json").read_text())
    weights = broken / registry["experts"][0]["path"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with started(broken, "--routing", "uniform") as process:
        lines = process.stderr.read().splitlines()
        assert process.wait(timeout=60) == 2
    assert lines[0].startswith("listening on ") and lines[1].startswith("loading ")
    (line,) = lines[2:]
    assert line.startswith("xelm: ") and "model.safetensors" in line


COUNTING = """
import sys, collections
from xelm.process import prepare
prepare()
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.split("/")[-1]]))
from xelm import open_run
from xelm.inference.routing import Routing
from xelm.serving.loading import compile_first_programs
from xelm.serving.models import open_served_models
compile_first_programs(open_served_models(open_run(sys.argv[1]), Routing(name="uniform")))
print(counts["cache_misses"], counts["cache_hits"])
"""


@pytest.mark.slow
def test_a_second_start_compiles_nothing_even_if_the_first_was_killed_while_it_wrote(
    chatty, tmp_path
):
    own = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    own |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    def counted():
        command = [sys.executable, "-c", COUNTING, str(chatty)]
        done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "persistent compilation cache" not in done.stderr
        return [int(word) for word in done.stdout.split()]

    misses, hits = counted()
    assert misses > 5 and hits == 0
    assert counted() == [0, misses]
    programs = sorted((tmp_path / "xelm" / "compiled").glob("*-cache"))
    assert len(programs) == misses
    # As a process leaves it that is killed.
    programs[0].write_bytes(programs[0].read_bytes()[:-100])
    programs[1].write_bytes(b"")
    assert counted() == [2, misses - 2]
    assert counted() == [0, misses]


def test_only_programs_that_were_written_in_part_are_deleted(tmp_path):
    whole = zlib.compress(b"program" * 99)
    for name, content in (("a", whole), ("b", whole[:-3]), ("c", b""), ("d", b"\x28\xb5\x2f\xfd")):
        (tmp_path / f"{name}-cache").write_bytes(content)
    drop_damaged_programs(tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*-cache")) == ["a-cache", "d-cache"]
    # Those that were checked are not read again, others are.
    (tmp_path / "b-cache").write_bytes(whole[:-3])
    drop_damaged_programs(tmp_path)
    assert not (tmp_path / "b-cache").exists()
    drop_damaged_programs(tmp_path / "none")
    assert not (tmp_path / "none").exists()
