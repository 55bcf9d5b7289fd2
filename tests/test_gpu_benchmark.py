"""The measurement of a borrowed GPU, at tiny shapes on a CPU: a run that is cut has what it found,
figures follow from each other, and a kernel that computes something else is found out."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import gpu_attention
import gpu_parts
import gpu_speed
from gpu_sizes import FULL, TINY

from xelm.models.target import GIB, Target
from xelm.training.flops import PEAKS, Peak
from xelm.training.sharding import mesh_of_devices

BENCHMARKS = str(Path(gpu.__file__).parent)
PROGRAM = f"""
import sys, time, types
sys.path.insert(0, {BENCHMARKS!r})
import gpu

def agreeing(sizes):
    yield {{"case": "documents", "agrees": True}}

def disagreeing(sizes):
    yield {{"case": "documents", "agrees": True}}
    yield {{"case": "window", "agrees": False}}

def hanging(sizes):
    yield {{"case": "first", "seconds": 0.5}}
    time.sleep(600)

def raising(sizes):
    yield {{"case": "first"}}
    raise ValueError("no such kernel")

def training(sizes):
    yield {{"system": "xelm", "mfu": 0.6, "tokens_a_second": 300.0}}

def comparing(sizes):
    yield {{"system": "torch.compile", "tokens_a_second": 400.0}}

parts = types.ModuleType("gpu_parts")
parts.RUN = {{
    "kernels": KERNELS, "limits": hanging, "attention": raising, "train XGLM 1.7B": training,
    "torch XGLM 1.7B": comparing,
}}
parts.TINY = "tiny"
parts.sizes = lambda tiny: "tiny" if tiny else "full"
parts.machine = lambda: {{"device": "a GPU"}}
sys.modules["gpu_parts"] = parts
gpu.LIMITS["limits"] = 1.5
gpu.PROGRAM = [sys.executable, __file__]
gpu.main()
"""


def run(folder, parts, kernels="agreeing", minutes="9"):
    """The exit code, the figures and the output of a run of these parts, all made up."""
    program, out = folder / "program.py", folder / "figures.json"
    program.write_text(PROGRAM.replace("KERNELS", kernels))
    command = [sys.executable, program, "--parts", parts, "--minutes", minutes, "--out", out]
    ended = subprocess.run(command, capture_output=True, text=True)
    figures = json.loads(out.read_text())
    return ended.returncode, {part["part"]: part for part in figures["parts"]}, figures, ended


def test_a_part_that_hangs_or_raises_is_reported_and_the_next_one_runs(tmp_path):
    code, parts, _, ended = run(tmp_path, "limits,attention,kernels")
    assert code == 0
    assert list(parts) == ["limits", "attention", "kernels"]
    assert parts["limits"]["status"] == "stopped at its limit of 2 s"
    assert parts["limits"]["rows"] == [{"case": "first", "seconds": 0.5}]
    assert parts["attention"]["status"] == "failed"
    assert parts["attention"]["error"] == "ValueError: no such kernel"
    assert parts["attention"]["rows"] == [{"case": "first"}]
    assert parts["kernels"]["status"] == "done"
    assert all(part["machine"] == {"device": "a GPU"} for part in parts.values())
    assert "| first | 0.5 |" in ended.stdout


@pytest.mark.parametrize(
    ("kernels", "minutes", "wanted"),
    [("agreeing", "9", 0), ("disagreeing", "9", 1), ("raising", "9", 1), ("agreeing", "0", 1)],
)
def test_the_exit_code_tells_whether_all_kernels_agree(tmp_path, kernels, minutes, wanted):
    code, parts, _, _ = run(tmp_path, "kernels", kernels, minutes)
    assert code == wanted
    assert (parts["kernels"]["status"] == "no time left") is (minutes == "0")


def test_goals_are_told_from_the_figures(tmp_path):
    _, _, figures, ended = run(tmp_path, "train XGLM 1.7B,torch XGLM 1.7B")
    found = {goal["goal"]: (goal["found"], goal["reached"]) for goal in figures["goals"]}
    assert found["MFU of XGLM 1.7B"] == (0.6, True)
    assert found["speed of XGLM 1.7B over torch"] == (0.75, False)
    assert found["share of bandwidth, decoding one request"] == (None, None)
    assert "| MFU of XGLM 1.7B | 0.55 | 0.6 | yes |" in ended.stdout


def test_every_part_has_a_time_limit():
    assert list(gpu.LIMITS) == list(gpu_parts.RUN)


def test_the_full_shapes_are_those_of_the_models():
    assert round(FULL.model("XGLM 1.7B").parameter_count / 1e6) == 1733
    assert round(FULL.model("Qwen 3 0.6B").parameter_count / 1e6) == 596
    assert FULL.length == 2048


CASES = ("documents", "window", "cap")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The kernel of GPUs, by the implementation of the same function that runs everywhere; options
    of which it is to hear something else can be put into the dictionary."""
    original, changes = jax.nn.dot_product_attention, {}

    def everywhere(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return original(*arrays, implementation="xla", **(options | changes))

    monkeypatch.setattr(jax.nn, "dot_product_attention", everywhere)
    monkeypatch.setattr(gpu_attention, "target_of", lambda devices: Target("gpu", 16 * GIB))
    some = {name: gpu_attention.CASES[name] for name in CASES}
    monkeypatch.setattr(gpu_attention, "CASES", some)
    return changes


def test_kernels_agree_with_the_reference(as_on_a_gpu):
    rows = {row["case"]: row for row in gpu_attention.kernels(TINY)}
    assert {name: row["way"] for name, row in rows.items()} == {
        "documents": "cuDNN",
        "window": "cuDNN",
        "cap": "blocks of queries",
    }
    for row in rows.values():
        assert row["agrees"] and 0 < row["error by key"] < gpu_attention.ERROR


@pytest.mark.parametrize(
    "changes", [{"mask": None}, {"scale": 0.2}, {"is_causal": False}, {"local_window_size": (1,)}]
)
def test_a_kernel_that_computes_something_else_is_found_out(as_on_a_gpu, changes, monkeypatch):
    as_on_a_gpu.update(changes)
    monkeypatch.setattr(gpu_attention, "CASES", {"documents": gpu_attention.CASES["documents"]})
    (row,) = gpu_attention.kernels(TINY)
    assert row["agrees"] is False
    assert ("error" in row) is ("local_window_size" in changes)  # at which the library raises


@pytest.fixture
def known_peak(monkeypatch):
    """The peak of this device is known; the mesh that a training sets is left at the end."""
    monkeypatch.setitem(PEAKS, jax.devices()[0].device_kind, Peak(1e12, 1e11))
    with jax.set_mesh(mesh_of_devices(np.asarray(jax.devices()[:1]).reshape(1, 1, 1, 1))):
        yield


def test_the_share_of_the_peak_follows_from_operations_and_time(known_peak):
    (row,) = gpu_speed.train(TINY, "Qwen 3 0.6B")
    assert row["peak_flops"] == 1e12
    assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"] / row["peak_flops"])
    assert row["tokens_a_second"] == pytest.approx(2 * 128 / row["seconds"])
    assert 0 < row["loss"] < math.log(512)  # less than that of guessing: the steps are real


def test_the_share_of_the_bandwidth_follows_from_bytes_and_time(known_peak):
    rows = list(gpu_speed.decode(TINY, "Qwen 3 0.6B"))
    assert [(row["case"], row["requests"]) for row in rows] == [
        *(("engine", 1), ("programs alone", 1), ("engine", 32), ("programs alone", 32)),
    ]
    parameters = 2 * TINY.model("Qwen 3 0.6B").parameter_count
    slot = 2 * 2 * 2 * 32 * 2  # keys and values, layers, heads, their size, bytes
    for row in rows:
        assert row["bytes"] == parameters + row["requests"] * 64 * slot
        assert row["bytes_a_second"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["bandwidth_share"] == pytest.approx(row["bytes_a_second"] / 1e11)


@pytest.mark.slow
def test_all_parts_run_at_tiny_shapes(tmp_path):
    """But those that compile by torch, which takes a minute each."""
    out = tmp_path / "figures.json"
    parts = [name for name in gpu.LIMITS if not name.startswith("torch")]
    command = [sys.executable, f"{BENCHMARKS}/gpu.py", "--tiny", "--out", out]
    subprocess.run([*command, "--minutes", "60", "--parts", ",".join(parts)], check=True)
    for part in json.loads(out.read_text())["parts"]:
        assert part["status"] == "done" and part["rows"] and part["tiny"]
        assert part["machine"]["jax"] == jax.__version__
