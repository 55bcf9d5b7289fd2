"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685) as values: each adds a product of two
thin matrices to the weights of dense layers. Files are in `xelm.models.peft`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from clustering.errors import UserError
from xelm.models.config import TARGETS, ModelConfig
from xelm.models.parameters import by_path, shapes

A, B = "lora_a", "lora_b"
"""Names of the factors beside the weight that they change: [inputs, rank] and [rank, outputs]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """A low-rank change of a model's weights: each W of `factors` becomes W + scale * A @ B."""

    scale: float
    """Factor of all products: alpha / rank."""
    factors: Mapping[str, tuple[Any, Any]]
    """Path of a dense layer, such as "blocks/query" -> A, float32 [L, inputs, rank], and B,
    float32 [L, rank, outputs], stacked over the layers of the model. Ranks may differ."""

    @property
    def value_count(self) -> int:
        """Number of values in all factors."""
        return sum(each.size for pair in self.factors.values() for each in pair)


def chosen_targets(names: str, config: ModelConfig) -> tuple[str, ...]:
    """Paths of the dense layers that "all", or a list such as "q,v", names. UserError for names
    that are unknown, or that this model lacks."""
    there = by_path(shapes(config))
    known = {name: path for name, path in TARGETS.items() if f"{path}/weight" in there}
    wanted = list(known) if names == "all" else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise UserError(
                f"lora.targets must be all, or some of {', '.join(known)} for this model; got "
                f"{name!r}"
            )
    return tuple(known[name] for name in dict.fromkeys(wanted))


def check_rank(rank: int, paths: Iterable[str], config: ModelConfig) -> None:
    """Raises UserError for a rank above that of a matrix, which then has fewer values than its
    factors."""
    there = by_path(shapes(config))
    for path in paths:
        most = min(there[f"{path}/weight"].shape[-2:])
        if rank > most:
            raise UserError(
                f"lora.rank must be at most {most}, the smaller dimension of {path}; got {rank}"
            )


def factors_of(parameters: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The factors in a tree of parameters by the path of their dense layer."""
    flat = by_path(parameters)
    paths = (path.removesuffix(f"/{A}") for path in flat if path.endswith(f"/{A}"))
    return {path: (flat[f"{path}/{A}"], flat[f"{path}/{B}"]) for path in paths}


def as_parameters(factors: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """A tree of parameters with these factors."""
    flat = {}
    for path, (first, second) in factors.items():
        flat |= {f"{path}/{A}": first, f"{path}/{B}": second}
    return unflatten_dict(flat, sep="/")


def merged(parameters: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The parameters with the changes of an adapter, W + scale * A @ B, computed in float32."""
    flat = dict(by_path(parameters))
    for path, (first, second) in adapter.factors.items():
        weight = flat[f"{path}/weight"]
        change = jnp.matmul(first, second, precision="highest") * adapter.scale
        flat[f"{path}/weight"] = weight.astype(jnp.float32) + change
    return unflatten_dict(flat, sep="/")


def concatenated(first: Adapter, second: Adapter) -> Adapter:
    """One adapter that changes weights as two do one after the other: factors side by side, so that
    ranks add up, since A B + C D = [A C] [B; D]. The second's B is brought to the scale of the
    first, which is exact where the quotient of the scales is a power of two."""
    factors = dict(first.factors)
    for path, (a, b) in second.factors.items():
        b = b * np.float32(second.scale / first.scale)
        if path in factors:
            a = np.concatenate([factors[path][0], a], axis=-1)
            b = np.concatenate([factors[path][1], b], axis=-2)
        factors[path] = a, b
    return Adapter(scale=first.scale, factors=factors)
