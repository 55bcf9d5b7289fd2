"""Adapters in the files of the library PEFT: adapter_config.json and adapter_model.safetensors,
written and read without that library, and never a pickle.

An adapter is for the tensors of a checkpoint of the Hub. Where the checkpoint has several of our
weights in one tensor, such as queries, keys and values, their adapters become one of the summed
rank, whose second factor is zero outside the blocks of each. vLLM serves these files if its
`max_lora_rank` is at least their `r`: there are no biases and no whole modules in them."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clustering.errors import UserError
from clustering.files import read_object, write_json
from xelm.models.adapters import Adapter
from xelm.models.config import ModelConfig
from xelm.models.families.family import Family, Tensor
from xelm.models.families.multimodal import beside_images
from xelm.models.layout import join, take
from xelm.models.parameters import by_path, shapes

CONFIG, FACTORS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG, FACTORS)
_ROOT = "base_model.model."
"""Beginning of the names of tensors in PEFT's files."""
_UNSUPPORTED = (
    *("use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices"),
    *("target_parameters", "alora_invocation_tokens", "arrow_config", "use_qalora"),
    *("use_bdlora", "kasa_config", "monteclora_config"),
)
"""Settings that make an adapter something else than W + scale * B @ A."""
_INITIAL = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of init_lora_weights with which W is the weight of the base. With others, as PiSSA or
OLoRA, PEFT has subtracted the product's first value from it."""
_PLAIN_PATTERN = re.compile(r"\^?[\w.]+\$?")
"""Keys of rank_pattern and alpha_pattern, which PEFT takes for regular expressions, that are names
of modules."""


class Product(NamedTuple):
    """The change of one stored tensor: scale * B @ A, as [outputs, inputs]."""

    a: np.ndarray
    """float32 [rank, inputs]."""
    b: np.ndarray
    """float32 [outputs, rank]."""
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Module:
    """A tensor of a checkpoint that an adapter changes."""

    name: str
    """Name of the module, without ".weight"."""
    layer: int
    tensor: Tensor


def write_adapter(
    directory: Path,
    config: ModelConfig,
    kind: Family,
    adapter: Adapter,
    *,
    base: str,
) -> None:
    """Writes an adapter into an existing directory, float32. base: Hub name or path of the model
    that it is for, as PEFT records it."""
    products = {
        module.name: _stored(module, adapter, config) for module in _modules(kind, config, adapter)
    }
    write_products(directory, config, kind, products, base=base)


def write_products(
    directory: Path,
    config: ModelConfig,
    kind: Family,
    products: Mapping[str, Product],
    *,
    base: str,
) -> None:
    """Writes an adapter of these changes, module -> `Product`, into an existing directory. All
    should have the same scale, since vLLM reads one for all."""
    ranks = {name: len(each.a) for name, each in products.items()}
    most = max(ranks.values())
    largest = next(each for each in products.values() if len(each.a) == most)
    alphas = {name: _number(each.scale * ranks[name]) for name, each in products.items()}
    alpha = _number(largest.scale * most)
    short = _short_names(kind, config, list(products))
    tensors = {}
    for name, each in products.items():
        tensors[f"{_ROOT}{name}.lora_A.weight"] = np.ascontiguousarray(each.a, np.float32)
        tensors[f"{_ROOT}{name}.lora_B.weight"] = np.ascontiguousarray(each.b, np.float32)
    rows = (kind.tensors[row] for row in kind.tensors if _is_layer(row))
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if config.causal else None,
        "base_model_name_or_path": base,
        "r": most,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(set(short.values())),
        "rank_pattern": _pattern(ranks, most, short),
        "alpha_pattern": _pattern(alphas, alpha, short),
        "fan_in_fan_out": any(row.inputs_first for row in rows),
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    write_json(directory / CONFIG, described)
    save_file(tensors, directory / FACTORS, {"format": "pt"})
    # The library writes for its user alone, whatever the umask says.
    shutil.copymode(directory / CONFIG, directory / FACTORS)


def read_products(directory: str | Path, kind: Family) -> dict[str, Product]:
    """The changes that an adapter makes: module -> `Product`. UserError for a file that is not
    readable, for settings that are not plain LoRA, and for tensors that are no pairs of factors."""
    directory = Path(directory)
    described = read_object(directory / CONFIG)
    _check_settings(directory, described)
    tensors = _read_factors(directory / FACTORS)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, values in tensors.items():
        found = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if found is None or values.ndim != 2:
            raise UserError(f"{directory / FACTORS} has {name}, which is no factor of LoRA")
        module, which = found.groups()
        pairs.setdefault(module.removeprefix(_ROOT), {})[which] = values
    # The adapter may have been trained on a model that reads images too.
    kind = beside_images(kind)
    prefixed = any(name.startswith(kind.prefix) for name in pairs)
    products = {}
    for name, pair in pairs.items():
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(f"{directory / FACTORS}: lora_A and lora_B of {name} do not match")
        alpha = _of_pattern(described.get("alpha_pattern"), name, float(described["lora_alpha"]))
        rank = len(pair["A"])
        scale = alpha / (rank**0.5 if described.get("use_rslora") else rank)
        module = kind.name(f"{name}.weight", prefixed).removesuffix(".weight")
        products[module] = Product(pair["A"], pair["B"], scale)
    return products


def read_adapter(directory: str | Path, config: ModelConfig, kind: Family) -> Adapter:
    """The adapter in a directory. Of weights that the checkpoint has in one tensor, each has the
    rank of the whole. Layers and weights that the file leaves out have a rank of 0, or zeros."""
    return adapter_of(read_products(directory, kind), config, kind)


def adapter_of(products: Mapping[str, Product], config: ModelConfig, kind: Family) -> Adapter:
    """The adapter that makes the changes of `products`, module -> `Product`. Where scales differ,
    the second factors are brought to the first scale."""
    scale = next(iter(products.values())).scale
    sizes = {path: leaf.shape[1:] for path, leaf in by_path(shapes(config)).items()}
    factors = {}
    for row, tensor in kind.tensors.items():
        if not _is_weight_of_layer(row) or tensor.paths[0] not in sizes:
            continue
        names = [row.format(n).removesuffix(".weight") for n in range(config.layer_count)]
        found = [products.get(name) for name in names]
        rank = max((len(each.a) for each in found if each), default=0)
        if not rank:
            continue
        for path in tensor.paths:
            inputs, outputs = sizes[path]
            a = np.zeros((config.layer_count, inputs, rank), np.float32)
            b = np.zeros((config.layer_count, rank, outputs), np.float32)
            whole = replace(tensor, inputs_first=False)
            for n, each in enumerate(found):
                if each is not None:
                    own = len(each.a)
                    shape = {other: (own, sizes[other][-1]) for other in tensor.paths}
                    ranges = [(0, own), (0, outputs)]
                    a[n, :, :own] = each.a.T
                    b[n, :own] = take(each.b, whole, path, shape, ranges, config.head_size)
                    b[n, :own] *= np.float32(each.scale / scale)
            factors[path.removesuffix("/weight")] = a, b
    return Adapter(scale=scale, factors=factors)


def chained(first: Mapping[str, Product], second: Mapping[str, Product]) -> dict[str, Product]:
    """One adapter's changes that are those of two, one after the other: ranks add up."""
    both = dict(first)
    for name, each in second.items():
        if name in both:
            a, b, scale = both[name]
            own = each.b * np.float32(each.scale / scale)
            each = Product(np.concatenate([a, each.a]), np.concatenate([b, own], axis=1), scale)
        both[name] = each
    return both


def _stored(module: _Module, adapter: Adapter, config: ModelConfig) -> Product:
    """The change of a stored tensor by the adapters of the weights in it, one of which has one."""
    paths = [path.removesuffix("/weight") for path in module.tensor.paths]
    pairs = {path: adapter.factors[path] for path in paths if path in adapter.factors}
    first = [np.asarray(pairs[path][0][module.layer]) for path in pairs]
    total, done, blocks = sum(each.shape[1] for each in first), 0, []
    sizes = by_path(shapes(config))
    for path in paths:
        block = np.zeros((total, sizes[f"{path}/weight"].shape[-1]), np.float32)
        if path in pairs:
            own = np.asarray(pairs[path][1][module.layer])
            block[done : done + len(own)] = own
            done += len(own)
        blocks.append(block)
    b = join(replace(module.tensor, inputs_first=False), blocks, config.head_size)
    return Product(np.concatenate([each.T for each in first]), b, adapter.scale)


def _modules(kind: Family, config: ModelConfig, adapter: Adapter) -> Iterator[_Module]:
    for row, tensor in kind.tensors.items():
        paths = (path.removesuffix("/weight") for path in tensor.paths)
        if _is_weight_of_layer(row) and any(path in adapter.factors for path in paths):
            for layer in range(config.layer_count):
                name = row.format(layer).removesuffix(".weight")
                yield _Module(name=name, layer=layer, tensor=tensor)


def _is_layer(row: str) -> bool:
    return "{}" in row


def _is_weight_of_layer(row: str) -> bool:
    return _is_layer(row) and row.endswith(".weight")


def _short_names(kind: Family, config: ModelConfig, names: Sequence[str]) -> dict[str, str]:
    """Module -> the name by which PEFT is to find it: its last part, such as "q_proj", if all dense
    layers that PEFT would find by that are among the modules, otherwise all of it."""
    rows = [row for row in kind.tensors if row.endswith(".weight")]
    every = {
        row.format(layer).removesuffix(".weight")
        for row in rows
        for layer in range(config.layer_count)
    }
    ends: dict[str, set[str]] = {}
    for name in every:
        ends.setdefault(name.rpartition(".")[2], set()).add(name)
    kinds = {end: {re.sub(r"\.\d+\.", ".{}.", name) for name in some} for end, some in ends.items()}
    there = set(names)

    def short(name: str) -> str:
        end = name.rpartition(".")[2]
        return end if len(kinds[end]) == 1 and ends[end] <= there else name

    return {name: short(name) for name in names}


def _pattern(values: Mapping[str, Any], usual: Any, short: Mapping[str, str]) -> dict[str, Any]:
    """Values that are not the usual one, by the short name of a module where all of that name have
    the same."""
    found: dict[str, set[Any]] = {}
    for name, value in values.items():
        found.setdefault(short[name], set()).add(value)
    several = {name for name, some in found.items() if len(some) > 1}
    return {
        name if short[name] in several else short[name]: value
        for name, value in values.items()
        if value != usual
    }


def _check_settings(directory: Path, described: Mapping[str, Any]) -> None:
    path = directory / CONFIG
    if described.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type must be LORA; got {described.get('peft_type')}")
    if described.get("bias", "none") != "none":
        raise UserError(f"{path}: bias must be none; got {described['bias']}")
    if (initial := described.get("init_lora_weights")) not in _INITIAL:
        raise UserError(
            f"{path}: init_lora_weights is {initial!r}, by which PEFT changes the weights of the "
            "base too; save the adapter with path_initial_model_for_weight_conversion, as plain "
            "LoRA"
        )
    if other := [name for name in _UNSUPPORTED if described.get(name)]:
        raise UserError(f"{path}: {', '.join(other)} must not be set; only plain LoRA is read")
    alphas = described.get("alpha_pattern") or {}
    wrong = [key for key in alphas if not _PLAIN_PATTERN.fullmatch(key)]
    numbers = [described.get("lora_alpha"), *alphas.values()]
    if wrong or any(type(number) not in (int, float) for number in numbers):
        raise UserError(
            f"{path}: lora_alpha must be a number, and alpha_pattern numbers by name of module; "
            f"got {numbers[0]!r} and {alphas}"
        )


def _of_pattern(pattern: Mapping[str, Any] | None, name: str, usual: float) -> float:
    """The value of the first key of a pattern that is the name of a module or the end of one."""
    for key, value in (pattern or {}).items():
        plain = key.removesuffix("$")
        whole = plain.startswith("^")
        plain = plain.removeprefix("^")
        if name == plain or (not whole and name.endswith(f".{plain}")):
            return float(value)
    return usual


def _read_factors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path} is missing; adapters in other files (.bin) can run code")
    try:
        with safe_open(path, framework="np") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not readable as safetensors: {error}") from error
    if not found:
        raise UserError(f"{path} has no tensors")
    return {name: values.astype(np.float32) for name, values in found.items()}


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
