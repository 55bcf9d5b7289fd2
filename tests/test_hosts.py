"""Two processes on this machine that train one expert together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_launch import branched, configure, process_of, steps_of, wait_for

from experts.lock import locked
from xelm.runs.run import open_run

__all__ = ["branched"]
CUT = {"runtime.mesh_data": 2, "runtime.mesh_fsdp": 2}


def start(run, number: int, port: int, *, devices: int = 2) -> subprocess.Popen:
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
    }
    command = [sys.executable, "-m", "xelm", "train", str(run), "de-fr", "--hosts"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def started(run, **options) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(run, number, port, **options) for number in range(2)]


def ended(processes) -> list[tuple[int, str, str]]:
    said = [process.communicate(timeout=240) for process in processes]
    return [(process.returncode, *each) for process, each in zip(processes, said)]


def losses(run) -> list[float]:
    path = run / "experts/de-fr/v1/metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def assert_alike(run, other):
    np.testing.assert_allclose(losses(run), losses(other), atol=1e-3)
    path = "experts/de-fr/v1/model.safetensors"
    one, two = load_file(run / path), load_file(other / path)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        np.testing.assert_allclose(weight, two[name], atol=5e-3)


@pytest.mark.slow
def test_two_hosts_train_what_one_trains(xelm, branched, tiny):
    configure(branched, CUT)
    first, second = ended(started(branched))
    assert first[0] == second[0] == 0, (first[2], second[2])
    assert "de-fr@v1" in first[1] and "de-fr" not in second[1]  # the first alone tells of it
    assert "going on" not in first[2] + second[2] and "tok" not in second[2]
    assert_alike(branched, tiny.directory)
    assert xelm("verify", branched).code == 0
    expert = open_run(branched).registry().expert("de-fr")
    assert expert.tokens == open_run(tiny.directory).registry().expert("de-fr").tokens


@pytest.mark.slow
def test_hosts_that_are_asked_to_end_save_the_same_step_and_others_go_on(xelm, branched, tmp_path):
    # No measurement before the end, whose checkpoint would be a second one.
    rare = {"runtime.checkpoint_every": 1000, "evaluation.every": 10_000}
    configure(branched, {"tokens": 40_000, **rare, **CUT})
    shutil.copytree(branched, tmp_path / "whole")
    configure(tmp_path / "whole", {"runtime.mesh_data": 1, "runtime.mesh_fsdp": 1})
    assert xelm("train", tmp_path / "whole", "de-fr").code == 0
    processes = started(branched)
    wait_for(lambda: steps_of(branched, "de-fr") > 30)
    # One machine alone is taken away: not the one that writes.
    assert process_of(branched, "de-fr") == processes[0].pid
    processes[1].send_signal(signal.SIGTERM)
    for code, _, said in ended(processes):
        assert code == os.EX_TEMPFAIL, said
        assert "de-fr was stopped by a signal; it is saved" in said.splitlines()[-1]
    (checkpoint,) = (branched / "train/de-fr/checkpoints").iterdir()
    assert int(checkpoint.name) >= 30 and (checkpoint / "facts").exists()
    # On one device, what four held.
    configure(branched, {"runtime.mesh_data": 1, "runtime.mesh_fsdp": 1})
    outcome = xelm("train", branched, "de-fr")
    assert outcome.code == 0, outcome.err
    assert f"de-fr: resumes after step {checkpoint.name}" in outcome.err
    assert_alike(branched, tmp_path / "whole")


@pytest.mark.slow
def test_what_the_first_host_may_not_do_all_are_told(branched):
    configure(branched, CUT)
    with locked(branched, "train-de-fr"):
        found = ended(started(branched))
    for code, _, said in found:
        assert code == 2 and "is in use (train-de-fr) by process " in said.splitlines()[-1]


@pytest.mark.slow
def test_a_mesh_that_leaves_out_a_host_is_refused_by_all(branched):
    configure(branched, {"runtime.mesh_data": 2})
    for code, _, said in ended(started(branched)):
        assert code == 2
        assert "by all 2 hosts together; a mesh of expert 1 x data 2" in said


def test_hosts_that_cannot_be_joined_are_a_users_mistake(branched):
    environment = {**os.environ, "JAX_NUM_PROCESSES": "2"}
    command = [sys.executable, "-m", "xelm", "train", str(branched), "--all", "--hosts"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "cannot join the other hosts (JAX_COORDINATOR_ADDRESS=" in done.stderr.splitlines()[-1]
