"""The parts of `benchmarks/gpu.py` by their names, and the machine that they run on."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial

import gpu_attention
import gpu_speed
import jax
from gpu_sizes import FULL, TINY, Row, Rows, Sizes

from xelm.training.flops import peak_of

BIG, SMALL = "XGLM 1.7B", "Qwen 3 0.6B"
RUN: Mapping[str, Callable[[Sizes], Rows]] = {
    "kernels": gpu_attention.kernels,
    "train XGLM 1.7B": partial(gpu_speed.train, name=BIG),
    "torch XGLM 1.7B": partial(gpu_speed.train_torch, name=BIG),
    "decode XGLM 1.7B": partial(gpu_speed.decode, name=BIG),
    "attention": gpu_attention.attention,
    "train Qwen 3 0.6B": partial(gpu_speed.train, name=SMALL),
    "torch Qwen 3 0.6B": partial(gpu_speed.train_torch, name=SMALL),
    "8 experts of Qwen 3 0.6B": partial(gpu_speed.decode, name=SMALL, experts=8),
    "int8 XGLM 1.7B": partial(gpu_speed.decode_int8, name=BIG),
    "limits": gpu_speed.measured_limits,
    "train XGLM 1.7B without the kernel": partial(gpu_speed.train, name=BIG, kernel=False),
}


def sizes(tiny: bool) -> Sizes:
    """The sizes of the problems: the tiny ones too where there is no accelerator."""
    if jax.default_backend() == "cpu" and not tiny:
        print("there is no accelerator: tiny shapes", file=sys.stderr)
        tiny = True
    return TINY if tiny else FULL


def machine() -> Row:
    """What the figures were measured on; jax.devices() decides."""
    device = jax.devices()[0]
    known = peak_of(device.device_kind)
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "peak_flops": known and known.flops,
        "peak_bandwidth": known and known.bandwidth,
        "platform": device.client.platform_version,
        "driver": _driver(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
    }


def _driver() -> str | None:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
