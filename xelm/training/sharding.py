"""Which device holds what: one mesh, and one table from the names of dimensions to its axes."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from clustering.errors import UserError
from xelm.config import TrainConfig
from xelm.models.config import ModelConfig
from xelm.models.parameters import logical_axes, shapes

AXES = ("expert", "data", "fsdp", "tensor")
# Logical axis of a parameter -> mesh axes. fsdp cuts what tensor leaves whole. Of the tables of
# embeddings the columns are cut, since the sizes of vocabularies divide by nothing.
RULES: dict[str, tuple[str, ...]] = {
    "layers": (),
    "vocabulary": (),
    "columns": ("fsdp", "tensor"),
    "heads": ("tensor",),
    "keys": ("tensor",),
    "ffn": ("tensor",),
    "width": ("fsdp",),
    "head": (),
    "positions": (),
    "types": (),
    "transformed": (),
}
# Rows of a batch are spread over every device that holds different parameters or data.
BATCH = ("data", "fsdp")


def make_mesh(config: TrainConfig, experts: int = 1) -> Mesh:
    """The mesh on which so many experts train in one program, 1 x 1 x 1 x 1 on a laptop; mesh_data
    None takes all remaining devices."""
    count, where = jax.device_count(), config.runtime
    rest = experts * where.mesh_fsdp * where.mesh_tensor
    data = count // rest if where.mesh_data is None else where.mesh_data
    if data * rest > count or data < 1:
        raise UserError(
            f"a mesh of expert {experts} x data {max(1, data)} x fsdp {where.mesh_fsdp} x "
            f"tensor {where.mesh_tensor} needs {max(1, data) * rest} devices; "
            f"there are {count}"
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
                f"the others stand idle: {why}",
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
    return _mesh(devices)


def mesh_of(mesh: Mesh, number: int) -> Mesh:
    """The part of a mesh that one of its experts has to itself."""
    return _mesh(mesh.devices[number : number + 1])


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """A sharding for each parameter of an expert, on a mesh of one; a dimension that its mesh axis
    does not divide is refused."""

    def place(shape, axes):
        names = [RULES[axis] for axis in axes]
        used = [name for some in names for name in some]
        if len(used) != len(set(used)):
            raise ValueError(f"two dimensions of {axes} fall on one mesh axis")
        for size, axis, some in zip(shape.shape, axes, names):
            ways = math.prod(mesh.shape[name] for name in some)
            if size % ways:
                raise UserError(
                    f"{axis} must be a multiple of mesh axis {' x '.join(some)} = {ways}; "
                    f"got {size}"
                )
        return NamedSharding(mesh, PartitionSpec(*(some or None for some in names)))

    return jax.tree.map(place, shapes(config), logical_axes(config))


def spread_lookup(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of a table whose columns are spread over an expert's part of the mesh.

    Each device looks up its columns for all rows of its `data`, and only then are columns exchanged
    for rows: the gradient of the table is made in place, spread as the table is.
    """
    spread = jax.lax.with_sharding_constraint
    tokens = spread(tokens, PartitionSpec("data"))
    columns = spread(_rows(table, tokens), PartitionSpec("data", None, RULES["columns"]))
    # In two steps: for both at once XLA would gather everything everywhere.
    columns = spread(columns, PartitionSpec("data", None, "fsdp"))
    return spread(columns, PartitionSpec(BATCH))


@jax.custom_vjp
def _rows(table, tokens):
    return table[tokens]


def _rows_forward(table, tokens):
    return table[tokens], (table, tokens)


def _rows_backward(found, gradient):
    # Summed in float32: a token met a thousand times would lose most of its gradient in bfloat16.
    table, tokens = found
    sums = jnp.zeros_like(table, jnp.float32).at[tokens].add(gradient.astype(jnp.float32))
    return sums.astype(table.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


def states_at(states: Float[Array, "B T D"], places: Int[Array, "B P"]) -> Float[Array, "B P D"]:
    """States at some places of each row: every device takes those of its own rows."""

    # By hand: for TPUs XLA's partitioner fails at it where `fsdp` and `tensor` are both used.
    def take(states, places):
        return jnp.take_along_axis(states, places[..., None], axis=1)

    rows = PartitionSpec(BATCH)
    return jax.shard_map(
        take,
        in_specs=(rows, rows),
        out_specs=rows,
        axis_names={*BATCH, "tensor"},
    )(states, places)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def stacked(mesh: Mesh, alone: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape and place of an array of each expert on a mesh, if `alone` is that of one on its part:
    one after the other along the first dimension, so that each device holds the very array that it
    would hold if it worked for its expert alone."""
    first, *others = alone.sharding.spec or (None,)
    inner = () if first is None else first if isinstance(first, tuple) else (first,)
    rows, *rest = alone.shape or (1,)
    return jax.ShapeDtypeStruct(
        (mesh.shape["expert"] * rows, *rest),
        alone.dtype,
        sharding=NamedSharding(mesh, PartitionSpec(("expert", *inner), *others)),
    )


def side_by_side(experts: Sequence[Any], wholes: Any) -> Any:
    """Trees of arrays, each on its expert's part of the mesh, as one tree of arrays like `wholes`
    (made by `stacked`); copies nothing but scalars."""

    def put(whole, *parts):
        pieces = [s.data for part in parts for s in part.addressable_shards]
        if not parts[0].shape:
            pieces = [_reshaped(piece, (1,)) for piece in pieces]
        return jax.make_array_from_single_device_arrays(whole.shape, whole.sharding, pieces)

    return jax.tree.map(put, wholes, *experts)


def of_expert(experts: Any, alone: Any) -> Any:
    """One expert's tree of arrays out of `side_by_side`, with its shapes and shardings. They share
    memory: once the whole is given up to a step, so are they."""

    def take(array, like):
        pieces = {s.device: s.data for s in array.addressable_shards}
        mine = [pieces[d] for d in like.sharding.mesh.devices.flat if d in pieces]
        if not like.shape:
            mine = [_reshaped(piece, ()) for piece in mine]
        return jax.make_array_from_single_device_arrays(like.shape, like.sharding, mine)

    return jax.tree.map(take, experts, alone)


def _reshaped(scalar: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """On the same device, by way of the host: a computation would want the whole mesh."""
    (device,) = scalar.devices()
    return jax.device_put(np.asarray(scalar).reshape(shape), device)
