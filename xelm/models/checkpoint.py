"""Checkpoints of the Hub in and out: directories of config.json, weights and tokenizer files."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError

from clustering.errors import UserError
from clustering.files import flush, read_object, write_json
from xelm.models.config import ModelConfig
from xelm.models.families import family, hub_config, model_config, writable_as
from xelm.models.families.family import Family
from xelm.models.layout import Range
from xelm.models.parameters import bind, by_path, graph, parameters_of, shapes, stacked
from xelm.models.transformer import Transformer
from xelm.models.weights import INDEX, Weights, weight_files, write_weights

# What makes a Hub checkpoint usable besides its weights, and travels with every expert.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def load_model(directory: str | Path, dtype: str = "float32") -> Transformer:
    """The model of a checkpoint directory, parameters and products in `dtype`."""
    config = read_config(directory)
    return bind(graph(config, dtype), load_parameters(directory, config, dtype=dtype))


def save_model(model: Transformer, directory: str | Path, like: str | Path | None = None) -> None:
    """Writes a checkpoint that transformers loads. `like`, a checkpoint of the same shape, gives
    config.json and tokenizer files. Without it config.json is made afresh, which goes for shapes of
    Llama and XGLM, and there is no tokenizer."""
    write_checkpoint(directory, model.config, parameters_of(model), like=like)


def read_config(directory: str | Path) -> ModelConfig:
    """The shape a checkpoint declares in its config.json."""
    source = read_hub_config(directory)
    if "quantization_config" in source:
        raise UserError(f"{directory}: quantised weights are not read; take the original ones")
    try:
        return model_config(source)
    except UserError as error:
        raise UserError(f"{directory}/config.json: {error}") from None


def read_hub_config(directory: str | Path) -> dict[str, Any]:
    """config.json as it is."""
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise UserError(
            f"there is no directory {directory}; a checkpoint of the Hub comes with: "
            "hf download OWNER/NAME --local-dir DIR"
        )
    if not path.exists():
        raise UserError(f"{directory} is no model checkpoint: it has no config.json")
    return read_object(path)


def _kind(directory: str | Path) -> Family:
    return family(read_hub_config(directory)["model_type"])


def load_parameters(
    directory: str | Path, config: ModelConfig, shardings: Any = None, dtype: str = "float32"
) -> dict[str, Any]:
    """The weights of a checkpoint on devices, in `dtype`. Each shard is read from the files once
    and placed before the next one is read, so that the host holds no more than one. shardings: of
    each parameter; None puts all on the first device. Missing, unknown and misshapen tensors are
    gathered and refused at once."""
    if shardings is None:
        single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: single, shapes(config))
    placed = by_path(shardings)
    weights = Weights(directory, _kind(directory), config)

    def place(path: str, shape: tuple[int, ...]) -> jax.Array:
        devices: dict[tuple[Range, ...], list[Any]] = {}
        for device, index in placed[path].addressable_devices_indices_map(shape).items():
            devices.setdefault(_ranges(index, shape), []).append(device)
        arrays = []
        for ranges, holders in devices.items():
            shard = weights.part(path, ranges, np.dtype(dtype))
            arrays += [jax.device_put(shard, device) for device in holders]
            jax.block_until_ready(arrays)  # until then the host's copy is kept
        return jax.make_array_from_single_device_arrays(shape, placed[path], arrays)

    # The largest first: a host that is also the device has most room then.
    wanted = {path: leaf.shape for path, leaf in by_path(shapes(config)).items()}
    order = sorted(wanted.items(), key=lambda item: -math.prod(item[1]))
    return unflatten_dict({path: place(path, shape) for path, shape in order}, sep="/")


def read_for_inference(
    directory: str | Path, config: ModelConfig, dtype: str = "float32"
) -> dict[str, Any]:
    """The weights of a checkpoint on the host, in `dtype` and the layout `for_inference`. Refuses
    what `load_parameters` refuses."""
    weights, kind = Weights(directory, _kind(directory), config), np.dtype(dtype)
    whole: dict[str, Any] = {}
    layers: list[dict[str, Any]] = [{} for _ in range(config.layer_count)]
    for path in by_path(shapes(config)):
        if not stacked(path):
            whole[path] = weights.turned(path, None, kind)
            continue
        for number, layer in enumerate(layers):
            layer[path.removeprefix("blocks/")] = weights.turned(path, number, kind)
    blocks = tuple(unflatten_dict(layer, sep="/") for layer in layers)
    return {**unflatten_dict(whole, sep="/"), "blocks": blocks}


def write_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    parameters: Mapping[str, Any],
    *,
    like: str | Path | None = None,
    model_type: str | None = None,
    special_ids: Mapping[str, int] | None = None,
    tokenizer: str | Path | None = None,
    extra: Sequence[Path] = (),
) -> None:
    """Writes `directory` whole or not at all: it appears by a rename once every byte is on disk.

    `like` gives config.json (with model_type and special ids) and tokenizer files. Without it the
    config is made for `model_type` (None: one that can say it) with `special_ids` ("bos_token_id"
    and so on), and the tokenizer files come from the directory `tokenizer`. Files in `extra` are
    copied in beside them.
    """
    with _whole_or_nothing(Path(directory)) as partial:
        if like is None:
            source = hub_config(model_type or writable_as(config), config)
            source |= special_ids or {}
            if tokenizer is not None:
                copy_tokenizer(tokenizer, partial)
        else:
            source = read_hub_config(like)
            copy_tokenizer(like, partial)
        flat = by_path(parameters)
        source.pop("torch_dtype", None)  # its older name
        source["dtype"] = str(flat["embedding"].dtype)
        write_json(partial / "config.json", source)
        write_weights(partial, family(source["model_type"]), config, flat)
        for path in extra:
            shutil.copyfile(path, partial / path.name)


def check_checkpoint(directory: str | Path) -> ModelConfig:
    """The shape of a checkpoint whose weights are there and match its config.json."""
    config = read_config(directory)
    Weights(directory, _kind(directory), config)
    return config


def copy_checkpoint(
    source: str | Path, directory: str | Path, save_tokenizer: Callable[[Path], object]
) -> None:
    """Copies what a checkpoint consists of, byte for byte, whole or not at all. Weights that do
    not match its config.json are refused; other files of `source` stay behind. save_tokenizer:
    writes tokenizer.json into a folder, for a checkpoint that has none."""
    check_checkpoint(source)
    with _whole_or_nothing(Path(directory)) as partial:
        for name in weight_files(source):
            shutil.copyfile(Path(source) / name, partial / name)
        if (Path(source) / INDEX).is_file():
            shutil.copyfile(Path(source) / INDEX, partial / INDEX)
        shutil.copyfile(Path(source) / "config.json", partial / "config.json")
        copy_tokenizer(source, partial)
        if not (partial / "tokenizer.json").exists():
            save_tokenizer(partial)


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copies the tokenizer and generation files that exist beside a checkpoint."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)


@contextmanager
def _whole_or_nothing(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` by a rename once all of it is on disk."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        flush(partial)
        if target.exists():
            raise UserError(f"{target} exists already and is left as it was")
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {target}: {reason}; nothing was changed") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _ranges(index: Sequence[slice], shape: Sequence[int]) -> tuple[Range, ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape))
