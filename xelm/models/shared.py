"""Parameters that a model shares with its base: of a directory that stores a difference, only what
differs from the complete checkpoint at the end of its chain is read, for inference.

A matrix that differs by a low rank becomes factors beside the base's matrix, so that many adapters
cost one base and little more; what is replaced becomes an array of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from xelm.models.checkpoint import family_of
from xelm.models.config import ModelConfig
from xelm.models.families.family import Family
from xelm.models.low_rank import read_low_rank
from xelm.models.narrow import narrowed
from xelm.models.parameters import EMBEDDING_FACTORS, by_path, shapes, stacked
from xelm.models.peft import CONFIG, Product, adapter_of, chained, read_products
from xelm.models.stored import LOW_RANK, chain, replaced_by
from xelm.models.weights import Weights

_EMBEDDING = "embedding"


def read_part(directory: str | Path, config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """What a directory's model has in place of the arrays of the complete checkpoint at the end of
    its chain of bases, or beside them, on the host, in the layout `for_inference` and as they are
    stored where weights have this dtype (`narrowed`); all others are missing. Factors have their
    scale in the second one."""
    kind = family_of(directory)
    weights = Weights(directory, kind, config)
    replaced, products = _changes(directory, kind)
    tables = {m: _path_of(kind, m) for m in products if "{}" not in _row(kind, m)}
    # Other single matrices are few and small, or are as large as a table: they are read whole.
    for module, path in tables.items():
        if path != _EMBEDDING:
            replaced.add(f"{module}.weight")
            del products[module]
    found: dict[str, Any] = {}
    blocks: list[dict[str, Any]] = [{} for _ in range(config.layer_count)]
    for path in by_path(shapes(config)):
        layers = range(config.layer_count) if stacked(path) else (None,)
        for layer in layers:
            if weights.name_of(path, layer) in replaced:
                values = weights.for_inference(path, layer, dtype)
                target = found if layer is None else blocks[layer]
                target[path.removeprefix("blocks/")] = values
    embedding = next((m for m, path in tables.items() if path == _EMBEDDING), None)
    if embedding is not None:
        a, b, scale = products.pop(embedding)
        for name, factor in (("a", a), ("b", b * np.float32(scale))):
            path = f"{EMBEDDING_FACTORS}/{name}"
            found[path] = narrowed(path, factor, dtype)
    if products:
        adapter = adapter_of(products, config, kind)
        for path, (first, second) in adapter.factors.items():
            name = path.removeprefix("blocks/")
            for layer, block in enumerate(blocks):
                scaled = second[layer] * np.float32(adapter.scale)
                for part, factor in (("lora_a", first[layer]), ("lora_b", scaled)):
                    block[f"{name}/{part}"] = narrowed(f"{path}/{part}", factor.T, dtype)
    parts = tuple(unflatten_dict(block, sep="/") for block in blocks)
    return {**unflatten_dict(found, sep="/"), "blocks": parts}


def overlaid(base: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a model: those of its base, the same arrays, with a part of their own as
    `read_part` returns it."""
    found = dict(base)
    for name, values in part.items():
        there = found.get(name)
        if isinstance(values, tuple):
            found[name] = tuple(map(overlaid, base[name], values))
        elif isinstance(values, Mapping) and isinstance(there, Mapping):
            found[name] = overlaid(there, values)
        else:
            found[name] = values
    return found


def _changes(directory: str | Path, kind: Family) -> tuple[set[str], dict[str, Product]]:
    """Names of the tensors that a chain of directories replaces whole, and the product that it adds
    to each other one, by module, as [outputs, inputs]."""
    replaced: set[str] = set()
    products: dict[str, Product] = {}
    for folder in reversed(chain(directory)[:-1]):
        for name in replaced_by(folder, kind):
            replaced.add(name)
            products.pop(name.removesuffix(".weight"), None)
        added: dict[str, Product] = {}
        if (folder / LOW_RANK).is_file():
            for name, product in read_low_rank(folder).items():
                module = name.removesuffix(".weight")
                added[module] = _turned(kind, module, product)
        if (folder / CONFIG).is_file():
            added = chained(added, read_products(folder, kind))
        own = {m: product for m, product in added.items() if f"{m}.weight" not in replaced}
        products = chained(products, own)
    return replaced, products


def _turned(kind: Family, module: str, product: Product) -> Product:
    """A product that is oriented as the stored tensor is, as [outputs, inputs]; a table stays as
    [rows, columns]."""
    if not kind.tensors[_row(kind, module)].inputs_first:
        return product
    return Product(product.b.T, product.a.T, product.scale)


def _row(kind: Family, module: str) -> str:
    """Name of the row of the family's table that a module is in."""
    name = f"{module}.weight"
    if name in kind.tensors:
        return name
    return ".".join("{}" if part.isdigit() else part for part in name.split("."))


def _path_of(kind: Family, module: str) -> str:
    return kind.tensors[_row(kind, module)].paths[0]
