"""Experts in processes side by side, and over a cluster: the same weights, whatever is lost."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from clustering.errors import UserError
from clustering.files import read_json, write_json
from experts import manifest
from experts.lock import locked, owner
from xelm.runs import launch
from xelm.runs.run import open_run
from xelm.runs.status import progress
from xelm.settings import to_json, vary
from xelm.training.metrics import read_metrics

NAMES = ("de-fr", "en-es")


@pytest.fixture
def branched(xelm, initialised, tiny, tmp_path):
    """A RUN of which no expert is trained."""
    shutil.copytree(initialised[0], tmp_path / "RUN")
    xelm("branch", tmp_path / "RUN", "--clusters", tiny.clusters)
    return tmp_path / "RUN"


def configure(run: Path, changes) -> None:
    """Other settings of the experts in run.json."""
    record = read_json(run / "run.json", newest_format=3)
    record["config"]["experts"] = to_json(vary(open_run(run).config.experts, changes))
    write_json(run / "run.json", record)
    manifest.record(run, ["run.json"], again=True)


def weights(run: Path) -> dict[str, bytes]:
    found = sorted(run.glob("experts/*/v1/model.safetensors"))
    return {path.parts[-3]: path.read_bytes() for path in found}


@pytest.mark.slow
def test_side_by_side_they_are_what_they_are_in_turn(xelm, branched, tiny):
    said = ("--set", "experts.runtime.log_every=2")
    outcome = xelm("train", branched, "--all", "--jobs", 2, *said)
    assert outcome.code == 0, outcome.err
    assert weights(branched) == {name: weights(tiny.directory)[name] for name in NAMES}
    for name in NAMES:
        folder = branched / "experts" / name / "v1"
        steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl")]
        assert len(steps) > 3 and all(step % 2 == 0 for step in steps[1:-1])
        assert said[1] in (folder / "README.md").read_text()
    assert [line.split()[:2] for line in outcome.out.splitlines()[2:]] == [
        [f"{name}@v1", "done"] for name in NAMES
    ]
    for name in NAMES:
        log = branched / "train" / f"{name}.log"
        assert f"{name}: begun; its log is {log}" in outcome.err
        assert f"{name}: done" in outcome.err and name in log.read_text()


@pytest.mark.slow
def test_in_one_program_they_are_what_they_are_in_turn(xelm, branched, tiny):
    outcome = xelm("train", branched, "--all", "--set", "experts.runtime.mesh_expert=2")
    assert outcome.code == 0, outcome.err
    assert weights(branched) == {name: weights(tiny.directory)[name] for name in NAMES}


@pytest.mark.slow
def test_one_that_fails_leaves_the_one_beside_it_alone(xelm, branched):
    with locked(branched, "train-de-fr"):
        outcome = xelm("train", branched, "--all", "--jobs", 2)
    assert outcome.code == 2 and set(weights(branched)) == {"en-es"}
    assert "is in use (train-de-fr)" in outcome.err.splitlines()[-1]


def test_processes_are_told_the_settings_of_this_time(branched):
    run = open_run(branched, settings=["experts.runtime.log_every=3", "experts.runtime.wandb=true"])
    told = launch._command(run)
    assert told[told.index(str(branched)) + 1 :] == [
        *("--set", "experts.runtime.log_every=3"),
        *("--set", "experts.runtime.wandb=true"),
    ]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("experts.tokens=1", "experts.tokens cannot change once a RUN is made; here "),
        (
            "grow.runtime.dtype=bfloat16",
            "grow.runtime.dtype cannot change once a RUN is made; here exp",
        ),
        (
            "dtype=bfloat16",
            "dtype cannot change once a RUN is made; here experts.runtime.NAME",
        ),
        ("experts.runtime.dtype=float16", "wanted float32 or bfloat16"),
        (
            "experts.runtime.accumulation_steps=7",
            "batch_size must be a multiple of runtime.accumulation_steps",
        ),
    ],
)
def test_settings_of_what_is_learned_stay(xelm, branched, setting, said):
    record, there = (branched / "run.json").read_bytes(), set(branched.rglob("*.jsonl"))
    outcome = xelm("train", branched, "--all", "--set", setting)
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1
    assert (branched / "run.json").read_bytes() == record
    assert set(branched.rglob("*.jsonl")) == there


def test_options_that_do_not_go_together(xelm, branched):
    for options, said in (
        (["--jobs", 0], "--jobs must be at least 1; got 0"),
        (["--devices", 2], "--devices goes with --engine ray"),
        (["--engine", "ray", "--devices", 0], "--devices must be at least 1; got 0"),
        (["--engine", "ray", "--jobs", 2], "--jobs goes with --engine local"),
    ):
        outcome = xelm("train", branched, "--all", *options)
        assert outcome.code == 2 and said in outcome.err


def test_jobs_get_equal_parts_of_the_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,5,6,7")
    found = [place.environment["CUDA_VISIBLE_DEVICES"] for place in launch._places(2)]
    assert found == ["0,2", "5,6"]
    with pytest.raises(UserError, match="6 jobs at a time want a GPU each; there are 5"):
        list(launch._places(6))


def test_jobs_get_equal_parts_of_the_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 2, 4, 8, 9})
    assert [list(place.cores) for place in launch._places(2)] == [[1, 2], [4, 8]]
    assert [list(place.cores) for place in launch._places(6)] == [[1], [2], [4], [8], [9], [1]]


NODES = [
    {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
    {"Alive": True, "Resources": {"CPU": 64.0}},
    {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0}},
]


def test_a_task_asks_for_accelerators_where_there_are_some():
    assert launch._resources(NODES, 2) == {"num_gpus": 2}
    assert launch._resources(NODES[1:], 2) == {"num_cpus": 2}
    tpus = [{"Alive": True, "Resources": {"CPU": 96.0, "TPU": 4.0}}]
    assert launch._resources(tpus, 4) == {"resources": {"TPU": 4}}
    with pytest.raises(UserError, match=r"4 devices for each expert are more than .*: 2 GPU"):
        launch._resources(NODES, 4)
    with pytest.raises(UserError, match="no machine with resources"):
        launch._resources([], 1)


# What takes a minute


def steps_of(run: Path, name: str) -> int:
    path = run / "train" / name / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


@pytest.fixture
def long(branched, xelm, tmp_path):
    """A RUN whose experts take some seconds, and their weights, trained in turn."""
    configure(branched, {"tokens": 320_000, "runtime.checkpoint_every": 20})
    shutil.copytree(branched, tmp_path / "whole")
    outcome = xelm("train", tmp_path / "whole", "--all")
    assert outcome.code == 0, outcome.err
    return branched, weights(tmp_path / "whole")


def process_of(run: Path, name: str) -> int:
    who = wait_for(lambda: owner(run, f"train-{name}"))
    return int(re.search(r"process (\d+)", who).group(1))


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on_in_another(xelm, long):
    run, wanted = long
    killed = []

    def kill():
        for number, how in ((40, signal.SIGKILL), (120, signal.SIGTERM)):
            wait_for(lambda number=number: steps_of(run, "de-fr") > number)
            os.kill(process_of(run, "de-fr"), how)
            killed.append(steps_of(run, "de-fr"))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    outcome = xelm("train", run, "--all", "--jobs", 2)
    killer.join(1)
    assert outcome.code == 0, outcome.err
    assert len(killed) == 2
    assert "de-fr: ended (-9), started again" in outcome.err
    assert f"de-fr: ended ({os.EX_TEMPFAIL}), started again" in outcome.err
    assert weights(run) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_whoever_is_asked_to_end_ends_its_processes_and_they_save(xelm, long, by):
    run, wanted = long
    command = [sys.executable, "-m", "xelm", "train", str(run), "--all", "--jobs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = {}

    def all_are_held():
        # Whoever began first waits, or it may be done before the other has begun.
        for name in NAMES:
            if name not in children and steps_of(run, name) > 30:
                children[name] = process_of(run, name)
                os.kill(children[name], signal.SIGSTOP)
        return len(children) == len(NAMES)

    wait_for(all_are_held)
    for child in children.values():
        os.kill(child, signal.SIGCONT)
    if by == signal.SIGINT:  # a terminal's Ctrl-C goes to all of them
        os.killpg(process.pid, by)
    else:
        process.send_signal(by)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == {signal.SIGTERM: os.EX_TEMPFAIL, signal.SIGINT: 130}[by], said
    assert "stopped by a signal; what was trained is saved" in said.splitlines()[-1]
    for child in children.values():
        assert not Path(f"/proc/{child}").exists()
    assert weights(run) == {}
    assert xelm("train", run, "--all").code == 0
    assert weights(run) == wanted


@pytest.mark.slow
def test_a_dense_baseline_apart_is_saved_before_its_command_ends(xelm, long):
    run, _ = long
    command = [sys.executable, "-m", "xelm", "train", str(run), "--dense", "--jobs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: steps_of(run, "dense") > 10)
    child = process_of(run, "dense")
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert not Path(f"/proc/{child}").exists()
    found = {each.name: each for each in progress(open_run(run))}["dense"]
    assert found.state == "stopped" and found.checkpoint_step == found.step > 0, said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_over_a_cluster_a_lost_machine_costs_no_expert(xelm, long, monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    run, wanted = long
    head = {"num_cpus": 0, "include_dashboard": False, "dashboard_host": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    # Of one accelerator each, and of CPUs for more tasks than that.
    nodes = [cluster.add_node(num_cpus=4, num_gpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="WARNING")
    at_once, lost = [], []

    def lose():
        # One of the two has a node of its own, whichever that is.
        wait_for(lambda: all(steps_of(run, name) > 60 for name in NAMES))
        at_once.append([process_of(run, name) for name in NAMES])
        cluster.remove_node(nodes[1], allow_graceful=False)
        lost.append([steps_of(run, name) for name in NAMES])

    killer = threading.Thread(target=lose, daemon=True)
    killer.start()
    try:
        outcome = xelm("train", run, "--all", "--engine", "ray")
    finally:
        ray.shutdown()
        cluster.shutdown()
    killer.join(1)
    assert outcome.code == 0, outcome.err
    assert lost and max(lost[0]) < 600
    assert len(set(at_once[0])) == 2
    assert weights(run) == wanted
    for name in NAMES:
        assert f"{name}: done" in outcome.err
    assert open_run(run).registry().training() == ()
