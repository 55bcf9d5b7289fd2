"""The memory that a training step takes at least, by arithmetic, so that a row that is too long for
the devices is refused before the step is compiled.

Only what certainly lies on a device at the end of the backward pass is counted: the state, the
gradients, and what every layer keeps for that pass. What a layer or the loss needs for a while is
left out, so a step that passes may still not fit; one that is refused does not."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clustering.errors import UserError
from xelm.models.config import ModelConfig
from xelm.models.target import target_of
from xelm.process import memory_bytes
from xelm.training.compiled import state_of
from xelm.training.expert_axis import expert_mesh
from xelm.training.sharding import rows_on_a_device
from xelm.training_config import TrainConfig

_STEP = 64
"""Lengths that are named are multiples of this many tokens, if they are not shorter."""


@functools.lru_cache(maxsize=64)
def state_bytes(model: ModelConfig, config: TrainConfig, mesh: Mesh) -> int:
    """Bytes on each device of what a training changes or reads at every step, and its gradients."""
    state = state_of(model, config, expert_mesh(mesh, 0))
    parts = config.runtime.accumulation_steps
    # Gradients of several parts are summed in float32.
    gradients = sum(
        _on_a_device(leaf, 4 if parts > 1 else leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(state.parameters)
    )
    return gradients + sum(_on_a_device(x, x.dtype.itemsize) for x in jax.tree.leaves(state))


def kept_bytes(model: ModelConfig, config: TrainConfig, mesh: Mesh) -> int:
    """Bytes on each device of what all layers keep of one token of each row for the backward
    pass."""
    heads = model.head_count * model.head_size
    spread = heads  # what attention gives
    if not config.runtime.rematerialise:
        keys = model.key_head_count * model.head_size
        spread += heads + 2 * keys + model.feedforward_width * (1 + model.gated)
    values = model.width + spread / mesh.shape["tensor"]
    itemsize = jnp.dtype(config.runtime.dtype).itemsize
    return int(rows_on_a_device(config, mesh) * model.layer_count * values) * itemsize


def check_memory(
    model: ModelConfig, config: TrainConfig, mesh: Mesh, there: int | float | None = None
) -> None:
    """Raises UserError, with the longest rows that may fit and the settings that help, if a step
    certainly needs more memory than a device has. there: bytes of a device; None: those of the
    mesh's devices, of which nothing is refused that do not say."""
    there = device_bytes(mesh) if there is None else there
    state, token = state_bytes(model, config, mesh), kept_bytes(model, config, mesh)
    length = config.sequence_length
    needed = state + token * length
    if needed <= there:
        return
    fits = int((there - state) // token)
    fits = fits // _STEP * _STEP or fits
    longest = (
        f"rows of {length:,} tokens need at least {_gb(needed)} on each device, which has "
        f"{_gb(there)}: at most {fits:,} tokens fit (sequence_length={fits})"
        if fits > 0
        else f"a step needs at least {_gb(state)} on each device for parameters, averages and "
        f"gradients alone; it has {_gb(there)}"
    )
    raise UserError(f"{longest}. Less memory is needed with {_advice(config, mesh, fits)}")


def device_bytes(mesh: Mesh) -> int | float:
    """Bytes of memory of each device of a mesh: what it says or, of CPUs, its part of the host's;
    infinity where nothing is known."""
    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    device = own[0] if own else mesh.devices.flat[0]
    if device.platform == "cpu":
        return memory_bytes() / max(1, len(own))
    stated = (device.memory_stats() or {}).get("bytes_limit") if own else None
    return stated or target_of([device]).memory_bytes or math.inf


def _on_a_device(array: Any, itemsize: int) -> int:
    return math.prod(array.sharding.shard_shape(array.shape)) * itemsize


def _advice(config: TrainConfig, mesh: Mesh, fits: int) -> str:
    """Settings that make a step smaller, those first that cost least."""
    runtime, ways = config.runtime, []
    if fits > 0 and not runtime.rematerialise:
        ways.append("runtime.rematerialise=true")
    if fits > 0 and rows_on_a_device(config, mesh) > 1:
        ways.append(f"a higher runtime.accumulation_steps (now {runtime.accumulation_steps})")
        ways.append(f"a smaller batch_size (now {config.batch_size})")
    if runtime.dtype == "float32" and mesh.devices.flat[0].platform != "cpu":
        ways.append("runtime.dtype=bfloat16")
    now = mesh.shape["fsdp"]
    return ", ".join([*ways, f"more devices that share all (runtime.mesh_fsdp, now {now})"])


def _gb(count: int | float) -> str:
    return f"{count / 1e9:.3g} GB"
