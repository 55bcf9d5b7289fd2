"""Which experts lie on the device: those asked last, as many as there is room for."""

import contextlib
import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax


class Holding(Sequence):
    """The parameters of experts, each brought to the device when it is asked for. Where there is no
    more room the one that was asked longest ago leaves, for the host's memory, and from there to
    where it came from."""

    def __init__(
        self,
        loaders: Sequence[Callable[[], Any]],
        *,
        names: Sequence[Hashable] | None = None,
        device_bytes: float | None = None,
        host_bytes: float | None = None,
    ):
        """loaders: each gives the parameters of an expert, on the host. names: of what each loads;
        None numbers them. device_bytes, host_bytes: of parameters, at most, beside the one expert
        that must lie there; None: `room`."""
        device_room, host_room = room()
        self._names = list(range(len(loaders)) if names is None else names)
        self._loaders = list(loaders)
        self._device: OrderedDict[Hashable, Any] = OrderedDict()
        self._host: OrderedDict[Hashable, Any] = OrderedDict()
        self._device_bytes = device_room if device_bytes is None else device_bytes
        self._host_bytes = host_room if host_bytes is None else host_bytes

    def sharing(self, loaders: Sequence[Callable[[], Any]], names: Sequence[Hashable]) -> "Holding":
        """Another, of other experts, in the same room: what has the same name is there once."""
        other = copy.copy(self)
        other._names, other._loaders = list(names), list(loaders)
        return other

    def only(self) -> None:
        """Has everything leave that others brought here by `sharing`."""
        for place in (self._device, self._host):
            for name in [name for name in place if name not in self._names]:
                del place[name]

    def __len__(self) -> int:
        return len(self._loaders)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        name = self._names[index]
        if name not in self._device:
            found = self._host.pop(name, None)
            found = self._loaders[index]() if found is None else found
            self._leave(_size(found))
            self._device[name] = jax.device_put(found)
        self._device.move_to_end(name)
        return self._device[name]

    @property
    def on_device(self) -> tuple[Hashable, ...]:
        """Names of those that lie there, the one asked last at the end."""
        return tuple(self._device)

    @property
    def on_host(self) -> tuple[Hashable, ...]:
        """Names of those that lie in the host's memory and not on the device."""
        return tuple(self._host)

    def _leave(self, wanted: int) -> None:
        """Makes room on the device."""
        while self._device and wanted + sum(map(_size, self._device.values())) > self._device_bytes:
            name, left = self._device.popitem(last=False)
            if _size(left) > self._host_bytes:
                continue
            while sum(map(_size, self._host.values())) + _size(left) > self._host_bytes:
                self._host.popitem(last=False)
            self._host[name] = jax.device_get(left)


def room() -> tuple[float, float]:
    """Bytes of parameters that may lie on the device and on the host: four fifths of the memory of
    an accelerator, the rest being for what is computed, and half of the host's, which on CPUs is
    the device's."""
    host = _memory() / 2
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return host, 0.0
    statistics = device.memory_stats() or {}
    return 0.8 * statistics.get("bytes_limit", float("inf")), host


def _memory() -> float:
    """Bytes of the host, or of the container that this runs in."""
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            found.append(float(Path(limit).read_text()))
    return min(found)


def _size(parameters: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
