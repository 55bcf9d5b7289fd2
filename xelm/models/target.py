"""The kind of device that a program is compiled for, as far as its best form depends on it.

A value, made where programs are compiled from the devices that they are for, and passed along to
the model: the default backend of the process may be another one, as when a program for a TPU is
compiled on a machine without one."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax

GIB = 2**30
_MEMORY = {
    **{"TPU v4": 32, "TPU v4 lite": 8, "TPU v5": 95, "TPU v5p": 95},
    **{"TPU v5 lite": 16, "TPU v5e": 16, "TPU v6 lite": 32, "TPU v6e": 32},
}
"""Name of a device -> GiB of its memory, by its maker's data sheet."""
_SMALL = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")
"""Names of TPUs with 16 MB of fast memory; later ones have at least four times as much."""
_LEAST_MEMORY = 8
"""GiB that an accelerator is taken to have if it does not say."""


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of device that programs are compiled for."""

    platform: str
    """"cpu", "tpu", "gpu" (of NVIDIA, with bfloat16 and cuDNN's attention: Ampere and later), or
    "older gpu" (any other)."""
    memory_bytes: int = 0
    """Memory of one accelerator, rounded down so that equal devices are equal values; 0 for CPUs,
    whose programs do not depend on it."""
    fast_memory_bytes: int = 2**26
    """Memory beside the matrix units of a TPU, at least."""

    @property
    def is_accelerator(self) -> bool:
        """Whether it computes large matrix products in units of their own."""
        return self.platform != "cpu"


CPU = Target("cpu")


def target_of(devices: Iterable[Any]) -> Target:
    """The kind of these devices, all alike, of which some may belong to other hosts, or to a
    topology that is only compiled for."""
    some = list(devices)
    device = next((d for d in some if d.process_index == jax.process_index()), some[0])
    if device.platform == "cpu":
        return CPU
    platform = device.platform
    if platform == "gpu" and not _is_recent(getattr(device, "compute_capability", None)):
        platform = "older gpu"
    fast = 2**24 if device.device_kind in _SMALL else 2**26
    if (known := _MEMORY.get(device.device_kind)) is not None:
        return Target(platform, known * GIB, fast)
    gib = max(_LEAST_MEMORY, (device.memory_stats() or {}).get("bytes_limit", 0) // GIB)
    # A power of two: on several hosts, all must compile the same program.
    return Target(platform, 2 ** (gib.bit_length() - 1) * GIB, fast)


def _is_recent(capability: object) -> bool:
    """Whether a GPU's compute capability, such as "8.0", is that of NVIDIA's Ampere or later; GPUs
    of others have names of architectures, or none."""
    try:
        return float(str(capability)) >= 8
    except ValueError:
        return False
