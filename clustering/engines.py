"""Engines: they apply a function to parts of documents, in this process or on a Ray cluster.

An engine is called like `map`, and returns the results in order.
"""

import logging
import os
import socket
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from clustering.errors import UserError

Engine = Callable[..., Iterable[Any]]
"""Function of (function, *sequences) that returns the results in order."""

Result = TypeVar("Result")

_RETRIES = 3
"""Number of retries of a part whose process or machine is lost; Ray Data would retry for ever."""
_TIMEOUT_SECONDS = 10.0
"""Seconds to wait for an answer of a cluster; Ray would wait for ever."""


def over_ray(function: Callable[..., Result], *sequences: Sequence[Any]) -> list[Result]:
    """`map` by Ray Data, a task for each part: on the cluster at the address RAY_ADDRESS, else on
    all cores of this machine.

    A task whose machine is lost is run again on another. Every machine needs this package, and the
    parts under the same paths. The first error ends all: a UserError or OSError of `function` is
    raised as it is, any other as a RuntimeError with its traceback, Ray's own as a UserError."""
    connect()
    import ray
    import ray.data
    import ray.exceptions

    arguments = [ray.put(each) for each in zip(*sequences)]
    if not arguments:
        return []
    rows = ray.data.range(len(arguments), override_num_blocks=len(arguments))
    rows = rows.map(
        partial(_run, function, arguments), ray_remote_args_fn=lambda: {"max_retries": _RETRIES}
    )
    found: dict[int, Any] = {}
    try:
        for row in rows.iter_rows():
            result = found[row["id"]] = row["result"].value
            if isinstance(result, Exception):
                raise result
    except ray.exceptions.RayError as error:
        raise UserError(f"Ray: {str(error).strip().splitlines()[-1]}") from error
    return [found[number] for number in range(len(arguments))]


ENGINES: dict[str, Engine] = {"local": map, "ray": over_ray}


def connect() -> None:
    """Connects to the Ray cluster at the address RAY_ADDRESS, else starts one on this machine;
    nothing happens if this process is connected already. UserError if Ray is not installed, or no
    cluster answers."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError('Ray is not installed; pip install "xelm[ray]"') from None
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon:
        try:
            socket.create_connection((host.strip("[]"), int(port)), _TIMEOUT_SECONDS).close()
        except (OSError, ValueError) as error:
            raise UserError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from None
    # Without "local" Ray would join what an earlier cluster left on this machine.
    ray.init(address or "local", log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _run(
    function: Callable[..., Any], arguments: Sequence[Any], row: dict[str, Any]
) -> dict[str, Any]:
    """The number of one part and its result, or its error; runs on a machine of the cluster."""
    import ray

    try:
        result = function(*ray.get(arguments[row["id"]]))
    except (UserError, OSError) as error:
        result = error
    except Exception:  # it may not survive pickling, and its traceback never does
        result = RuntimeError(traceback.format_exc())
    return {"id": row["id"], "result": _Value(result)}


@dataclass(frozen=True, slots=True)
class _Value:
    """Wrapper of a result, which Ray Data would otherwise turn into columns."""

    value: Any
