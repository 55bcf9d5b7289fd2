"""What a program sets before XLA starts, and never against the user."""

import os
import subprocess
import sys

import pytest

from xelm import process

FLAG = "--xla_gpu_enable_latency_hiding_scheduler"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, f"{FLAG}=true"),
        ({"JAX_PLATFORMS": "cuda,cpu"}, f"{FLAG}=true"),
        ({"XLA_FLAGS": "--xla_dump_to=a"}, f"--xla_dump_to=a {FLAG}=true"),
        ({"XLA_FLAGS": f"{FLAG}=false"}, f"{FLAG}=false"),
        ({"JAX_PLATFORMS": "cpu"}, None),
        ({"JAX_PLATFORMS": "tpu"}, None),
    ],
)
def test_gpus_compute_while_they_communicate_unless_the_user_says_otherwise(
    given, wanted, monkeypatch
):
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process.importlib.util, "find_spec", lambda name: "cuda13" in name)
    process.overlap_communication()
    process.overlap_communication()  # as of a process that another one started
    assert os.environ.get("XLA_FLAGS") == wanted


def test_nothing_is_set_where_jax_uses_no_gpu(monkeypatch):
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(process.importlib.util, "find_spec", lambda name: None)
    process.overlap_communication()
    assert "XLA_FLAGS" not in os.environ


def test_this_jaxlib_knows_the_flag():
    """XLA ends a process that is given a flag that it does not know."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{FLAG}=true"}
    program = "import jax; print(len(jax.devices()))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
