"""Fingerprints of arrays: equal for equal bits on any mesh, others for anything else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from xelm.training.fingerprint import fingerprints


def on_mesh(array, spec, shape=(2, 4)):
    mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


def of(array) -> str:
    return fingerprints({"a": on_mesh(array, ())})["a"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int16, jnp.uint8, jnp.int32])
def test_they_do_not_depend_on_how_an_array_is_spread(dtype):
    array = jnp.asarray(np.random.default_rng(0).integers(0, 99, (8, 16)), dtype)
    wanted = of(array)
    for spec, shape in [((None, "fsdp"), (2, 4)), (("data", "fsdp"), (2, 4)), (("fsdp",), (1, 8))]:
        assert fingerprints({"a": on_mesh(array, spec, shape)}) == {"a": wanted}


def test_any_bit_any_exchange_and_any_block_of_zeros_is_seen():
    ones = np.ones((64, 64), np.float32)
    whole = of(ones)
    found = {whole}
    for bit in range(32):
        changed = ones.copy().view(np.uint32)
        changed[7, 9] ^= np.uint32(1 << bit)
        found.add(of(changed.view(np.float32)))
    for rows in (1, 2, 16, 64):  # as pages that a disk lost
        changed = ones.copy()
        changed[:rows] = 0
        found.add(of(changed))
    stairs = np.arange(4096, dtype=np.float32).reshape(64, 64)
    found |= {of(stairs), of(stairs.T.copy()), of(stairs[::-1].copy())}
    assert len(found) == 1 + 32 + 4 + 3


def test_each_array_is_named_by_its_path():
    tree = {"b": {"c": on_mesh(jnp.zeros(8), ())}, "a": on_mesh(jnp.zeros(()), ())}
    assert set(fingerprints(tree)) == {"a", "b/c"}
