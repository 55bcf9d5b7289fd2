"""Cache of experts' parameters: those used last lie on the device, within a memory budget. What
several experts share, their base, lies there once."""

import contextlib
import copy
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from xelm.models.shared import overlaid


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlay:
    """How the parameters of a model are loaded that shares arrays with its base."""

    base_name: Hashable
    """Name of the base in the cache, under which other models share it."""
    base: "Loader"
    """How the parameters of the base are loaded."""
    part: Callable[[], Any]
    """Returns what the model has in place of them or beside them, on the host, as `read_part`."""

    @property
    def bases(self) -> list[Hashable]:
        """Names of the base, of its base, and so on."""
        more = self.base.bases if isinstance(self.base, Overlay) else []
        return [self.base_name, *more]


Loader = Callable[[], Any] | Overlay


class ParameterCache(Sequence):
    """Parameters of models, each loaded on the device when it is indexed. Where the device's budget
    is used up, the least recently used model moves to the host's memory, and is dropped from there
    in the end."""

    def __init__(
        self,
        loaders: Sequence[Loader],
        *,
        names: Sequence[Hashable] | None = None,
        device_bytes: float | None = None,
        host_bytes: float | None = None,
    ):
        """loaders: functions that return the parameters of one model each, on the host, or an
        `Overlay`. names: one for each loader; None numbers them. device_bytes, host_bytes: bytes of
        parameters at most (the model in use lies on the device in any case); None: those of
        `memory_budget`."""
        device_budget, host_budget = memory_budget()
        self._names = list(range(len(loaders)) if names is None else names)
        self._loaders = list(loaders)
        self._device: OrderedDict[Hashable, Any] = OrderedDict()
        self._host: OrderedDict[Hashable, Any] = OrderedDict()
        self._whole: dict[Hashable, Any] = {}  # overlays; they hold no arrays of their own
        self._device_bytes = device_budget if device_bytes is None else device_bytes
        self._host_bytes = host_budget if host_bytes is None else host_bytes

    def with_experts(
        self, loaders: Sequence[Loader], names: Sequence[Hashable]
    ) -> "ParameterCache":
        """A cache of other models within the same memory: models of one name are loaded once."""
        other = copy.copy(self)
        other._names, other._loaders = list(names), list(loaders)
        return other

    def evict_others(self, *kept: "ParameterCache") -> None:
        """Drops what neither this cache nor those `kept`, of the same memory (`with_experts`),
        use."""
        used = {name for cache in (self, *kept) for name in cache._used()}
        for place in (self._device, self._host, self._whole):
            for name in [name for name in place if name not in used]:
                del place[name]

    def _used(self) -> list[Hashable]:
        bases = (each.bases for each in self._loaders if isinstance(each, Overlay))
        return [*self._names, *itertools.chain.from_iterable(bases)]

    def __len__(self) -> int:
        return len(self._loaders)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        return self._found(self._names[index], self._loaders[index])

    def _found(self, name: Hashable, loader: Loader) -> Any:
        if not isinstance(loader, Overlay):
            return self._loaded(name, loader)
        base = self._found(loader.base_name, loader.base)
        part = self._loaded(name, loader.part, beside=loader.bases)
        if name not in self._whole:
            self._whole[name] = overlaid(base, part)
        return self._whole[name]

    def _loaded(
        self, name: Hashable, load: Callable[[], Any], beside: Collection[Hashable] = ()
    ) -> Any:
        """What has this name, on the device. beside: names of what is to stay there in any case."""
        if name not in self._device:
            found = self._host.pop(name, None)
            found = load() if found is None else found
            self._evict(_size(found), beside)
            self._device[name] = jax.device_put(found)
        self._device.move_to_end(name)
        return self._device[name]

    @property
    def on_device(self) -> tuple[Hashable, ...]:
        """Names of the models on the device, the most recently used last."""
        return tuple(self._device)

    @property
    def on_host(self) -> tuple[Hashable, ...]:
        """Names of the models in the host's memory and not on the device."""
        return tuple(self._host)

    def _evict(self, wanted: int, kept: Collection[Hashable]) -> None:
        """Frees so many bytes of the device's budget, but not those of `kept`."""
        while wanted + sum(map(_size, self._device.values())) > self._device_bytes:
            name = next((name for name in self._device if name not in kept), None)
            if name is None:
                return
            evicted = self._device.pop(name)
            self._whole.clear()  # they refer to arrays that are to be freed
            if _size(evicted) > self._host_bytes:
                continue
            while sum(map(_size, self._host.values())) + _size(evicted) > self._host_bytes:
                self._host.popitem(last=False)
            self._host[name] = jax.device_get(evicted)


def memory_budget() -> tuple[float, float]:
    """Bytes of parameters that may lie on the device and on the host: four fifths of the memory of
    an accelerator, the rest being for computing, and half of the host's (a CPU's own memory)."""
    host = _memory() / 2
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return host, 0.0
    statistics = device.memory_stats() or {}
    return 0.8 * statistics.get("bytes_limit", float("inf")), host


def _memory() -> float:
    """Bytes of the host's memory, or of the container's."""
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            found.append(float(Path(limit).read_text()))
    return min(found)


def _size(parameters: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
