"""One training on several hosts, of which the first writes what they share."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clustering.errors import UserError

_SETTINGS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Makes this process one of several that train together, before anything else asks for devices.

    Who they are is known on TPU pods and in Slurm steps; elsewhere the environment says it:
    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    address, count, number = (os.environ.get(name) for name in _SETTINGS)
    try:
        if count is None and number is None:
            jax.distributed.initialize(address)
        else:
            jax.distributed.initialize(address, int(count or ""), int(number or ""))
    except (ValueError, RuntimeError) as error:
        known = ", ".join(f"{name}={os.environ.get(name, '')}" for name in _SETTINGS)
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot join the other hosts ({known}): {reason}") from error


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every host is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def placed(arrays: Mapping[str, np.ndarray], sharding: Any) -> dict[str, jax.Array]:
    """Arrays that every host has whole, spread over the devices of all."""
    if jax.process_count() == 1:
        return jax.device_put(dict(arrays), sharding)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
        for name, array in arrays.items()
    }


def gathered(tree: Any) -> Any:
    """The tree with each array whole on this host, one array after the other."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)
