"""Trainings on several hosts, of which the first writes the files that they share."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clustering.errors import UserError, first_line
from xelm.training.preemption import Preempted

_MESSAGE_BYTES = 4000
_SETTINGS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Makes this process one of several that train together, before JAX lists its devices.

    On TPU pods and in Slurm steps JAX finds the other hosts; elsewhere the environment names them:
    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Raises
    UserError where they cannot be joined.
    """
    address, count, number = (os.environ.get(name) for name in _SETTINGS)
    try:
        if count is None and number is None:
            jax.distributed.initialize(address)
        else:
            jax.distributed.initialize(address, int(count or ""), int(number or ""))
    except (ValueError, RuntimeError) as error:
        known = ", ".join(f"{name}={os.environ.get(name, '')}" for name in _SETTINGS)
        raise UserError(f"cannot join the other hosts ({known}): {first_line(error)}") from error


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def wait_for_all(what: str) -> None:
    """Returns when every host has called this; `what` names the call."""
    if several():
        multihost_utils.sync_global_devices(what)


class SharedError(UserError):
    """A mistake that every host raises, so that all end alike."""


@contextmanager
def first_error_shared() -> Iterator[None]:
    """Every host runs the block; if the first fails, every host raises its reason."""
    reason = ""
    try:
        yield
    except (UserError, OSError) as error:
        if not several() or not is_first():
            raise
        reason = str(error) or type(error).__name__
    if not several():
        return
    padded = reason.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    received = multihost_utils.broadcast_one_to_all(np.frombuffer(padded, np.uint8))
    message = bytes(np.asarray(received, np.uint8)).rstrip(b"\0").decode(errors="replace")
    if message:
        raise SharedError(message)


def first_does(what: Callable[[], object]) -> None:
    """Runs `what` on the first host alone; if it fails, every host raises the reason."""
    with first_error_shared():
        if is_first():
            what()


@contextmanager
def ending_alone() -> Iterator[None]:
    """Ends this process at once on an error that other hosts do not raise, but would wait for."""
    try:
        yield
    except (SharedError, Preempted):
        raise
    except Exception as error:
        if not several():
            raise
        if not isinstance(error, UserError):
            traceback.print_exc()
        print(f"xelm: {error}", file=sys.stderr, flush=True)
        os._exit(2)


def placed(arrays: Mapping[str, np.ndarray], sharding: Any) -> dict[str, jax.Array]:
    """Arrays that every host has in full, spread over the devices of all hosts."""
    if not several():
        return jax.device_put(dict(arrays), sharding)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
        for name, array in arrays.items()
    }
