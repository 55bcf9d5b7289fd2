"""Processes that train several small systems in parallel."""

import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait

from xelm.process import prepare


def workers(jobs: int) -> ProcessPoolExecutor:
    """Processes that share the cores among them, as small models make poor use of several."""
    context = get_context("spawn")
    places = context.Queue()
    for place in range(jobs):
        places.put(place)
    return ProcessPoolExecutor(jobs, context, _settle, (places, jobs))


def _settle(places, jobs: int) -> None:
    place = places.get()
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[place % len(cores) :: jobs])
    prepare()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
