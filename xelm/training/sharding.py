"""Which device holds what: one mesh, and one table from the names of dimensions to its axes."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clustering.errors import UserError
from xelm.config import TrainConfig
from xelm.models.config import ModelConfig
from xelm.models.parameters import logical_axes, shapes

AXES = ("data", "fsdp", "tensor")
# Logical axis of a parameter -> mesh axis. fsdp cuts what tensor leaves whole.
RULES: dict[str, str | None] = {
    "layers": None,
    "vocabulary": "tensor",
    "heads": "tensor",
    "keys": "tensor",
    "ffn": "tensor",
    "width": "fsdp",
    "head": None,
    "positions": None,
    "types": None,
    "transformed": None,
}
# Rows of a batch are spread over every device that holds different parameters or data.
BATCH = PartitionSpec(None, ("data", "fsdp"))


def make_mesh(config: TrainConfig) -> Mesh:
    """The mesh of a training, 1 x 1 x 1 on a laptop; mesh_data 0 takes all remaining devices."""
    count = jax.device_count()
    rest = config.mesh_fsdp * config.mesh_tensor
    data = config.mesh_data or count // rest
    if data * rest > count or data < 1:
        raise UserError(
            f"a mesh of data {config.mesh_data} x fsdp {config.mesh_fsdp} x tensor "
            f"{config.mesh_tensor} needs {max(1, config.mesh_data) * rest} devices; "
            f"there are {count}"
        )
    rows = config.batch_size // config.accumulation_steps
    if config.mesh_data == 0:
        # Not more ways than the rows allow: a small batch on a large machine still trains.
        data = max(d for d in range(1, data + 1) if rows % (d * config.mesh_fsdp) == 0 or d == 1)
    if rows % (data * config.mesh_fsdp):
        raise UserError(
            f"batch_size / accumulation_steps must be a multiple of data x fsdp = "
            f"{data * config.mesh_fsdp}; got {rows}"
        )
    shape = (data, config.mesh_fsdp, config.mesh_tensor)
    devices = jax.devices()[: data * rest]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def parameter_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """A sharding for each parameter; a dimension that its mesh axis does not divide is refused."""

    def place(shape, axes):
        names = [RULES[axis] for axis in axes]
        used = [name for name in names if name is not None]
        if len(used) != len(set(used)):
            raise ValueError(f"two dimensions of {axes} fall on one mesh axis")
        for size, axis, name in zip(shape.shape, axes, names):
            if name is not None and size % mesh.shape[name]:
                raise UserError(
                    f"{axis} must be a multiple of mesh axis {name} = {mesh.shape[name]}; "
                    f"got {size}"
                )
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree.map(place, shapes(config), logical_axes(config))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())
