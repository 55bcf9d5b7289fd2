"""How a function reaches parts of documents: here and in turn, or on the machines of a Ray cluster.

An engine is called as `map` is, and gives the results in order.
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
"""(function, *sequences) -> results in order."""

Result = TypeVar("Result")

_RETRIES = 3
"""Of a part whose process or machine is lost; Ray Data would go on for ever."""
_PATIENCE = 10.0
"""Seconds that a cluster has to answer; Ray would wait for ever."""


def over_ray(function: Callable[..., Result], *sequences: Sequence[Any]) -> list[Result]:
    """`map` by Ray Data, a task for each part: on the cluster whose address RAY_ADDRESS says, else
    on all cores here.

    A task whose machine is lost is run again on another. Every machine needs this package, and
    finds the parts where they lie here. The first fault ends it: raises a UserError or OSError of
    `function` as it is, RuntimeError with the traceback of any other, and UserError for Ray's own.
    """
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
    """To the Ray cluster whose address RAY_ADDRESS says, else to one on this machine alone, unless
    this process is connected. UserError where Ray is not installed, or no cluster answers."""
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
            socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
        except (OSError, ValueError) as error:
            raise UserError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from None
    # "local", or what an earlier cluster left on this machine would be taken for one.
    ray.init(address or "local", log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _run(
    function: Callable[..., Any], arguments: Sequence[Any], row: dict[str, Any]
) -> dict[str, Any]:
    """On a machine of the cluster: the result of one part, or its fault, beside its number."""
    import ray

    try:
        result = function(*ray.get(arguments[row["id"]]))
    except (UserError, OSError) as error:
        result = error
    except Exception:  # which may not outlive the way back, and its traceback never does
        result = RuntimeError(traceback.format_exc())
    return {"id": row["id"], "result": _Value(result)}


@dataclass(frozen=True, slots=True)
class _Value:
    """Keeps Ray Data from making columns of what is inside."""

    value: Any
