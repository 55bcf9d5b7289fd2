"""Cache of experts' parameters: those used last lie on the device, within a memory budget. What
several experts share, their base, lies there once. The caches of keys and values of texts are in
the same account."""

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import jax

from xelm.models.shared import overlaid
from xelm.process import memory_bytes


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
        self._sizes: dict[Hashable, int] = {}  # bytes of what was loaded
        self._whole: dict[Hashable, Any] = {}  # overlays; they hold no arrays of their own
        self._in_use: list[Hashable] = []  # the model that was indexed last, and its bases
        self._reserved: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._device_bytes = device_budget if device_bytes is None else device_bytes
        self._host_bytes = host_budget if host_bytes is None else host_bytes

    def with_experts(
        self, loaders: Sequence[Loader], names: Sequence[Hashable]
    ) -> "ParameterCache":
        """A cache of other models within the same memory: models of one name are loaded once."""
        other = copy.copy(self)
        other._names, other._loaders = list(names), list(loaders)
        return other

    def reserve(self, owner: Any, more: int, beside: int) -> bool:
        """Whether an owner of other arrays on the device may allocate so many further bytes, or has
        freed them where `more` is negative. Parameters are evicted to make space, and closed texts
        of all owners dropped (`drop_kept`), but not `beside`, bytes of the model in use. What an
        owner has reserved is free again when it is gone."""
        if more > 0 and self.reserved + more + beside > self._device_bytes:
            for other in list(self._reserved):
                other.drop_kept()
            if self.reserved + more + beside > self._device_bytes:
                return False
        self._reserved[owner] = self._reserved.get(owner, 0) + more
        if more > 0:
            self._evict(0, self._in_use)
        return True

    @property
    def reserved(self) -> int:
        """Bytes of the device's budget that are not for parameters."""
        return sum(self._reserved.values())

    @property
    def device_bytes(self) -> float:
        """Bytes of the device's budget."""
        return self._device_bytes

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
        name, loader = self._names[index], self._loaders[index]
        self._in_use[:] = [name, *(loader.bases if isinstance(loader, Overlay) else [])]
        return self._found(name, loader)

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
            self._sizes[name] = _size(found)
            self._evict(self._sizes[name], beside)
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
        budget = self._device_bytes - self.reserved
        while wanted + sum(map(self._sizes.__getitem__, self._device)) > budget:
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
    host = memory_bytes() / 2
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return host, 0.0
    statistics = device.memory_stats() or {}
    return 0.8 * statistics.get("bytes_limit", float("inf")), host


def _size(parameters: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
