"""Which experts lie on the device: those asked last, as many as there is room for."""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
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
        device_bytes: float | None = None,
        host_bytes: float | None = None,
    ):
        """loaders: each gives the parameters of an expert, on the host. device_bytes, host_bytes:
        of parameters, at most, beside the one expert that must lie there; None: `room`."""
        device_room, host_room = room()
        self._loaders = loaders
        self._device: OrderedDict[int, Any] = OrderedDict()
        self._host: OrderedDict[int, Any] = OrderedDict()
        self._device_bytes = device_room if device_bytes is None else device_bytes
        self._host_bytes = host_room if host_bytes is None else host_bytes

    def __len__(self) -> int:
        return len(self._loaders)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        if index not in self._device:
            found = self._host.pop(index, None)
            found = self._loaders[index]() if found is None else found
            self._leave(_size(found))
            self._device[index] = jax.device_put(found)
        self._device.move_to_end(index)
        return self._device[index]

    @property
    def on_device(self) -> tuple[int, ...]:
        """Those that lie there, the one asked last at the end."""
        return tuple(self._device)

    @property
    def on_host(self) -> tuple[int, ...]:
        """Those that lie in the host's memory and not on the device."""
        return tuple(self._host)

    def _leave(self, wanted: int) -> None:
        """Makes room on the device."""
        while self._device and wanted + sum(map(_size, self._device.values())) > self._device_bytes:
            index, left = self._device.popitem(last=False)
            if _size(left) > self._host_bytes:
                continue
            while sum(map(_size, self._host.values())) + _size(left) > self._host_bytes:
                self._host.popitem(last=False)
            self._host[index] = jax.device_get(left)


def room() -> tuple[float, float]:
    """Bytes of parameters that may lie on the device and on the host: four fifths of the memory of
    an accelerator, the rest being for what is computed, and half of the host's, which on CPUs is
    the device's."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return host, 0.0
    statistics = device.memory_stats() or {}
    return 0.8 * statistics.get("bytes_limit", float("inf")), host


def _size(parameters: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
