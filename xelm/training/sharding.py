"""Where arrays lie: the mesh of devices, and the table from names of dimensions to its axes."""

import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clustering.errors import UserError
from xelm.models.config import ModelConfig
from xelm.models.parameters import by_path, logical_axes, shapes
from xelm.training.trainable import axes_of
from xelm.training_config import TrainConfig

AXES = ("expert", "data", "fsdp", "tensor")
RULES: dict[str, tuple[str, ...]] = {
    "columns": ("fsdp", "tensor"),
    "heads": ("tensor",),
    "keys": ("tensor",),
    "ffn": ("tensor",),
    "width": ("fsdp",),
    **dict.fromkeys(("layers", "vocabulary", "head", "positions", "types", "transformed"), ()),
    **dict.fromkeys(("rank", "experts", "factor"), ()),
}
"""Logical axis of a parameter -> mesh axes over which it is split. fsdp splits what tensor leaves
whole. Tables of embeddings are split by columns, since vocabulary sizes divide by nothing."""
BATCH = ("data", "fsdp")
"""Mesh axes over which rows of a batch are spread: all but those that share rows."""


def make_mesh(config: TrainConfig, experts: int = 1) -> Mesh:
    """The mesh on which `experts` experts train in one program, 1 x 1 x 1 x 1 on a laptop. With
    mesh_data None, rows are spread over as many of the remaining devices as divide them. Raises
    UserError for a mesh that the devices or the batch do not allow."""
    count, where = jax.device_count(), config.runtime
    rest = experts * where.mesh_fsdp * where.mesh_tensor
    data = count // rest if where.mesh_data is None else where.mesh_data
    if data * rest > count or data < 1:
        raise UserError(
            f"a mesh of expert {experts} x data {max(1, data)} x fsdp {where.mesh_fsdp} x tensor "
            f"{where.mesh_tensor} needs {max(1, data) * rest} devices; there are {count}"
        )
    rows = config.batch_size // where.accumulation_steps
    if where.mesh_data is None:
        # Not more ways than the rows allow: a small batch on a large machine still trains.
        most = data
        data = max(d for d in range(1, data + 1) if rows % (d * where.mesh_fsdp) == 0 or d == 1)
        if data * rest < count and jax.process_index() == 0:
            wanted = where.accumulation_steps * most * where.mesh_fsdp
            why = f"a batch_size that is a multiple of {wanted} uses {most * rest}"
            if data == most:
                why = f"expert x fsdp x tensor = {rest} does not divide {count}"
            print(
                f"batch_size {config.batch_size} is spread over {data * rest} of {count} devices, "
                f"the others are idle: {why}",
                file=sys.stderr,
            )
    if rows % (data * where.mesh_fsdp):
        raise UserError(
            f"batch_size / accumulation_steps must be a multiple of data x fsdp = "
            f"{data * where.mesh_fsdp}; got {rows}"
        )
    shape = (experts, data, where.mesh_fsdp, where.mesh_tensor)
    devices = np.asarray(jax.devices()[: data * rest]).reshape(shape)
    for part in devices:
        hosts = {device.process_index for device in part.flat}
        if len(hosts) < jax.process_count():
            raise UserError(
                f"each expert is trained by all {jax.process_count()} hosts together; a mesh of "
                f"{' x '.join(f'{axis} {size}' for axis, size in zip(AXES, shape))} has devices of "
                f"{len(hosts)}"
            )
    return mesh_of_devices(devices)


def rows_on_a_device(config: TrainConfig, mesh: Mesh) -> int:
    """Number of rows of an expert that each device of a mesh computes at once."""
    rows = config.batch_size // config.runtime.accumulation_steps
    return rows // (mesh.shape["data"] * mesh.shape["fsdp"])


def mesh_of_devices(devices: np.ndarray) -> Mesh:
    """The mesh of devices [expert, data, fsdp, tensor]."""
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_shardings(
    config: ModelConfig, mesh: Mesh, like: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The sharding of each parameter of an expert on its part of a mesh. Raises UserError for a
    dimension that its mesh axes do not divide. like: a tree of `trainable.divide`; None: that of
    all parameters."""
    known = by_path(logical_axes(config))

    def place(path, shape):
        axes = axes_of(path, known)
        for size, axis in zip(shape.shape, axes):
            some = RULES[axis]
            ways = math.prod(mesh.shape[name] for name in some)
            if size % ways:
                raise UserError(
                    f"{axis} must be a multiple of mesh axis {' x '.join(some)} = {ways}; "
                    f"got {size}"
                )
        return NamedSharding(mesh, _spec(axes))

    tree = by_path(shapes(config) if like is None else like)
    return unflatten_dict({path: place(path, leaf) for path, leaf in tree.items()}, sep="/")


def spread_as_parameters(tree: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Gradients, say, in a tree of `trainable.divide`, spread over the mesh that is set as the
    parameters are. Left to itself, XLA may keep them otherwise, and exchange parameters and
    averages instead, in float32."""
    known = by_path(logical_axes(config))
    flat = {
        path: jax.lax.with_sharding_constraint(leaf, _spec(axes_of(path, known)))
        for path, leaf in by_path(tree).items()
    }
    return unflatten_dict(flat, sep="/")


def _spec(axes: tuple[str, ...]) -> PartitionSpec:
    """How a parameter with dimensions of these names is split."""
    names = [RULES[axis] for axis in axes]
    used = [name for some in names for name in some]
    if len(used) != len(set(used)):
        raise ValueError(f"two dimensions of {axes} fall on one mesh axis")
    return PartitionSpec(*(some or None for some in names))
