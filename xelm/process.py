"""Settings of the process that a program may make and a library may not."""

import contextlib
import ctypes
import importlib.util
import math
import os
import platform
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
"""Packages by which JAX uses NVIDIA's GPUs."""
# An unknown flag ends the process: this one is in jaxlib since 2022, and in NVIDIA's own images.
_LATENCY_HIDING = "xla_gpu_enable_latency_hiding_scheduler"


def prepare() -> None:
    """Prepares the process of a program: silences helper libraries, and sets the cache of compiled
    code, what accelerators do at once, how freed memory is kept and how many files may be open.
    Called before anything uses a device, as XLA reads its settings then."""
    import absl.logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # No reports that the user did not ask for: a host counts who loads which data set, even for
    # files on this disk, and Ray reports what runs on a cluster.
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Orbax logs failures in its threads with tracebacks; they are raised and reported in a line.
    absl.logging.set_verbosity(absl.logging.FATAL)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xelm" / "compiled"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    # All of them: a server has dozens that each take less than a second.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    drop_damaged_programs(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))
    overlap_communication()
    keep_freed_memory()
    open_files()  # a corpus of two hundred languages is some thousand files


def overlap_communication() -> None:
    """Has GPUs compute while they pass arrays to one another, unless the user has set this. On CPUs
    nothing is set, nor on TPUs, whose compiler does so by itself."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    allowed = not platforms or {"cuda", "gpu"} & set(platforms.split(","))
    if not allowed or not any(importlib.util.find_spec(name) for name in _GPU_PLUGINS):
        return
    given = os.environ.get("XLA_FLAGS", "")
    if _LATENCY_HIDING not in given:
        os.environ["XLA_FLAGS"] = f"{given} --{_LATENCY_HIDING}=true".strip()


def drop_damaged_programs(cache: Path) -> None:
    """Deletes compiled programs of which a process that was killed has written only a part: JAX
    would warn of each one at every start and compile it again, and would never replace it. Only
    those are read that were written since the last call."""
    marker, now = cache / ".checked", time.time_ns()
    with contextlib.suppress(OSError):
        since = marker.stat().st_mtime_ns if marker.exists() else 0
        for file in cache.glob("*-cache"):
            if file.stat().st_mtime_ns >= since and not _is_whole(file.read_bytes()):
                file.unlink(missing_ok=True)
        if cache.is_dir():
            marker.touch()
            os.utime(marker, ns=(now, now))


def _is_whole(program: bytes) -> bool:
    """Whether a compressed program is complete, as far as the standard library can read it: JAX
    compresses by zlib, or by Zstandard where that is installed."""
    if program[:1] != b"\x78":
        return bool(program)
    try:
        zlib.decompress(program)
    except zlib.error:
        return False
    return True


def cores() -> int:
    """Number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> float:
    """Bytes of the host's memory, or of the container's; infinity on systems that do not say."""
    found = [math.inf]
    if hasattr(os, "sysconf"):
        found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            found.append(float(Path(limit).read_text()))
    return min(found)


def open_files() -> int:
    """Raises the number of files and connections that this process may have open at once to what
    the system allows, and returns it."""
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
    """Makes the C library keep freed memory for later, unless the user has given it settings.

    XLA on CPUs asks for the same memory at every step, and a third of the time goes into getting it
    from the system again (benchmarks/freed_memory.py). The process then never shrinks."""
    # malloc.h: M_ARENA_MAX (one heap for all threads), M_MMAP_MAX (nothing beside it) and
    # M_TRIM_THRESHOLD (nothing at its end is given back).
    _set_allocation({-8: 1, -4: 0, -1: -1})


def return_freed_memory() -> None:
    """Makes the C library return large blocks as they are freed, unless the user has given it
    settings.

    This is for a process whose steps ask for different sizes each time: kept blocks would not fit
    again between small lasting ones, and the process would grow for long."""
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
