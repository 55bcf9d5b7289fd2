"""The kind of device that programs are compiled for."""

from types import SimpleNamespace

import jax
import pytest

from xelm.models.target import CPU, GIB, Target, target_of


def device(platform, kind, memory=None, **more):
    limits = None if memory is None else {"bytes_limit": int(memory * GIB)}
    return SimpleNamespace(
        platform=platform,
        device_kind=kind,
        process_index=jax.process_index(),
        memory_stats=lambda: limits,
        **more,
    )


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (device("cpu", "cpu"), CPU),
        (device("tpu", "TPU v5 lite"), Target("tpu", 16 * GIB)),
        (device("tpu", "TPU v4"), Target("tpu", 32 * GIB, 2**24)),
        (device("tpu", "TPU v3", 15.5), Target("tpu", 8 * GIB, 2**24)),
        # Three quarters of 141 GB, as JAX takes by default, rounded down to a power of two.
        (device("gpu", "NVIDIA H200", 105.7, compute_capability="9.0"), Target("gpu", 64 * GIB)),
        (device("gpu", "NVIDIA A100", 30, compute_capability="8.0"), Target("gpu", 16 * GIB)),
        # Without bfloat16, for which cuDNN's attention raises an error.
        (device("gpu", "Tesla T4", 11, compute_capability="7.5"), Target("older gpu", 8 * GIB)),
        # Without cuDNN.
        (device("gpu", "AMD", 64, compute_capability="gfx90a"), Target("older gpu", 64 * GIB)),
        (device("gpu", "unknown"), Target("older gpu", 8 * GIB)),
    ],
)
def test_devices_are_of_their_kind(found, wanted):
    assert target_of([found, found]) == wanted
    assert wanted.is_accelerator == (wanted != CPU)


def test_the_devices_of_this_machine_are_cpus():
    assert target_of(jax.devices()) == CPU
