"""One training on several hosts, of which the first writes what they share."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clustering.errors import UserError
from xelm.training.preemption import Preempted

_MESSAGE_BYTES = 4000
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


def several() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def wait_for_all(what: str) -> None:
    """Returns when every host is here."""
    if several():
        multihost_utils.sync_global_devices(what)


class SharedError(UserError):
    """A mistake that every host was told of, so that all end alike."""


def first_does(what: Callable[[], object]) -> None:
    """Has the first host do something; if it fails there, every host raises why."""
    if not several():
        what()
        return
    said = ""
    if is_first():
        try:
            what()
        except (UserError, OSError) as error:
            said = str(error) or type(error).__name__
    padded = said.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(padded, np.uint8))
    message = bytes(np.asarray(told, np.uint8)).rstrip(b"\0").decode(errors="replace")
    if message:
        raise SharedError(message)


@contextmanager
def ending_alone() -> Iterator[None]:
    """What is raised in here by one host of several, and is not told to the others, ends its
    process at once: they would wait for it for ever, and end when it is gone."""
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
    """Arrays that every host has whole, spread over the devices of all."""
    if not several():
        return jax.device_put(dict(arrays), sharding)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
        for name, array in arrays.items()
    }


def first_writes(what: Callable[[bool], object]) -> None:
    """Has every host take part in something of which the first alone writes the result: `what` gets
    whether this host is the first. If the first cannot write, every host raises why."""
    failed: list[UserError | OSError] = []
    try:
        what(is_first())
    except (UserError, OSError) as error:
        if not is_first():
            raise
        failed.append(error)

    def tell() -> None:
        for error in failed:
            raise error

    first_does(tell)
