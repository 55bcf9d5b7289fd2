"""The mesh axis `expert`: arrays of experts that train in one program, stacked along their first
dimension, so that each device has the very array that it would have for its expert alone."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xelm.training.sharding import mesh_of_devices


def expert_mesh(mesh: Mesh, number: int) -> Mesh:
    """The part of a mesh that expert `number` has to itself."""
    return mesh_of_devices(mesh.devices[number : number + 1])


def stacked_shape(mesh: Mesh, alone: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape and sharding of the stacked arrays of all experts, of which one alone is `alone`."""
    first, *others = alone.sharding.spec or (None,)
    inner = () if first is None else first if isinstance(first, tuple) else (first,)
    rows, *rest = alone.shape or (1,)
    return jax.ShapeDtypeStruct(
        (mesh.shape["expert"] * rows, *rest),
        alone.dtype,
        sharding=NamedSharding(mesh, PartitionSpec(("expert", *inner), *others)),
    )


def stack(experts: Sequence[Any], like: Any) -> Any:
    """Stacks trees of arrays, each on its expert's part of the mesh, to one tree with the shapes
    and shardings of `like` (made by `stacked_shape`). Copies nothing but scalars."""

    def put(whole, *parts):
        pieces = [s.data for part in parts for s in part.addressable_shards]
        if not parts[0].shape:
            pieces = [_reshaped(piece, (1,)) for piece in pieces]
        return jax.make_array_from_single_device_arrays(whole.shape, whole.sharding, pieces)

    return jax.tree.map(put, like, *experts)


def unstack(stacked: Any, like: Any) -> Any:
    """One expert's tree of arrays out of stacked ones, with the shapes and shardings of `like`.
    They share memory: once a step is given the stacked arrays to overwrite, these are gone too."""

    def take(array, like):
        pieces = {s.device: s.data for s in array.addressable_shards}
        mine = [pieces[d] for d in like.sharding.mesh.devices.flat if d in pieces]
        if not like.shape:
            mine = [_reshaped(piece, ()) for piece in mine]
        return jax.make_array_from_single_device_arrays(like.shape, like.sharding, mine)

    return jax.tree.map(take, stacked, like)


def _reshaped(scalar: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A scalar in another shape, by way of the host: a computation would need the whole mesh."""
    (device,) = scalar.devices()
    return jax.device_put(np.asarray(scalar).reshape(shape), device)
