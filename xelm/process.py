"""What a program may set for its process, and a library may not."""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path


def prepare() -> None:
    """What a program may set and a library may not: quiet helpers, a cache of compiled code, how
    memory is held, how many files may be open."""
    import absl.logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Nothing goes out that nobody asked for: who loads which data set is counted by a host even for
    # files on this disk, and what runs on a Ray cluster is reported.
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Orbax logs what fails in its threads, with tracebacks, before it is raised and told in a line.
    absl.logging.set_verbosity(absl.logging.FATAL)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xelm" / "compiled"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    keep_freed_memory()
    open_files()  # a corpus of two hundred languages is some thousand files


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def open_files() -> int:
    """How many files and connections this process may have open at once, after it has raised that
    to what the system allows."""
    if sys.platform == "win32":
        return 2**13  # what its C library allows
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # macOS names a limit that it does not allow
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return 2**20 if soft == resource.RLIM_INFINITY else soft


def keep_freed_memory() -> None:
    """Has the C library keep what is freed for what comes next, unless the user has given it
    settings of his own. XLA on CPUs asks for the same memory at every step, and a third of the time
    goes into getting it from the system afresh (benchmarks/freed_memory.py). The process then stays
    as large as it once was."""
    # malloc.h: M_ARENA_MAX (one heap for all threads), M_MMAP_MAX (nothing beside it) and
    # M_TRIM_THRESHOLD (nothing at its end is given back).
    _set_allocation({-8: 1, -4: 0, -1: -1})


def return_freed_memory() -> None:
    """Has the C library give large blocks back as they are freed, unless the user has given it
    settings of his own: for a process whose steps ask for other sizes each time, between whose
    lasting small blocks those kept would not fit again, and which would grow for long."""
    # M_ARENA_MAX, M_MMAP_MAX and M_MMAP_THRESHOLD (from so many bytes on, not on the heap), and
    # M_TRIM_THRESHOLD: a step's small blocks at the end of the heap are kept.
    _set_allocation({-8: 1, -4: 2**16, -3: 2**20, -1: 2**28})


def _set_allocation(options: Mapping[int, int]) -> None:
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    library = ctypes.CDLL(None)
    for option, value in options.items():
        library.mallopt(option, value)
