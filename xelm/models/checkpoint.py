"""Reading and writing checkpoints of the Hub: directories of config.json, weights and tokenizer."""

import json
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
from clustering.hub_files import INDEX, LICENCES, WEIGHTS, weight_files
from xelm.models.adapters import Adapter
from xelm.models.companions import companions, copy_companions
from xelm.models.config import WEIGHTS_DTYPES, ModelConfig
from xelm.models.families import (
    auto_config,
    differences,
    family_in,
    hub_config,
    hub_family,
    hub_source,
    read_auto_config,
    shape_of,
    takes_images,
    writable_as,
)
from xelm.models.families.family import Family
from xelm.models.layout import Range
from xelm.models.narrow import whole
from xelm.models.parameters import bind, by_path, graph, parameters_of, shapes, stacked
from xelm.models.peft import ADAPTER_FILES, Product, chained, read_products, write_adapter
from xelm.models.stored import BASE, chain, own_weight_files, root, write_base
from xelm.models.transformer import Origin, Transformer
from xelm.models.weights import Weights, stored_tensors, write_weights

README = "README.md"
MODEL_DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes that `load_model` takes."""


def load_model(directory: str | Path, dtype: str = "auto") -> Transformer:
    """The model of a checkpoint directory, with parameters and products in `dtype`: float32,
    bfloat16, float16 or "auto" (see `inference_dtype`). It remembers the checkpoint for
    `save_model`."""
    if dtype not in ("auto", *MODEL_DTYPES):
        raise UserError(f"dtype must be auto or one of {', '.join(MODEL_DTYPES)}; got {dtype}")
    config = read_config(directory)
    dtype = inference_dtype(directory) if dtype == "auto" else dtype
    model = bind(graph(config, dtype), load_parameters(directory, config, dtype=dtype))
    directory = root(directory)
    model.origin = Origin(
        config=json.dumps(read_hub_config(directory)),
        dtype=stored_dtype(directory),
        directory=str(Path(directory).absolute()),
        companions=tuple(companions(directory)),
    )
    return model


def save_model(
    model: Transformer,
    directory: str | Path,
    like: str | Path | None = None,
    *,
    dtype: str | None = None,
) -> None:
    """Writes a checkpoint that transformers loads.

    config.json, tokenizer files and the dtype of the weights are those of the checkpoint that the
    model was loaded from, or of the checkpoint `like`, which must have the same shape. A model that
    was not loaded gets a new config.json, which is possible for shapes of Llama and XGLM, and no
    tokenizer. dtype: dtype of the weights instead."""
    origin, parameters = model.origin, parameters_of(model)
    if like is not None or origin is None:
        dtype = dtype or (None if like is None else stored_dtype(like))
        write_checkpoint(directory, model.config, parameters, like=like, dtype=dtype)
        return
    gone = [n for n in origin.companions if not (Path(origin.directory) / n).is_file()]
    if gone:
        raise UserError(
            f"{origin.directory}, which the model was loaded from, has no {', '.join(gone[:5])} "
            "any more; name a checkpoint with the same tokenizer with like="
        )
    write_checkpoint(
        directory,
        model.config,
        parameters,
        source=json.loads(origin.config),
        tokenizer=origin.directory if origin.companions else None,
        dtype=dtype or origin.dtype,
    )


def read_config(directory: str | Path) -> ModelConfig:
    """The shape of the model that transformers would load from a checkpoint directory."""
    return _shape_and_family(directory)[0]


def _shape_and_family(directory: str | Path) -> tuple[ModelConfig, Family]:
    source, based = read_hub_config(directory), (Path(directory) / BASE).is_file()
    if "quantization_config" in source:
        raise UserError(f"{directory}: quantised weights are not supported; use the original ones")
    if (Path(directory) / "adapter_config.json").is_file() and not based:
        raise UserError(
            f"{directory} has an adapter (adapter_config.json), which transformers would apply to "
            "the weights; merge the two (merge_and_unload of peft), or remove the adapter's files"
        )
    try:
        hub = read_auto_config(root(directory))
        return shape_of(hub), family_in(root(directory), hub)
    except UserError as error:
        raise UserError(f"{directory}/config.json: {error}") from None


def family_of(directory: str | Path) -> Family:
    """The family of a checkpoint directory."""
    return _shape_and_family(directory)[1]


def read_hub_config(directory: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint's config.json; that of its base where it has none, and that of
    the text model alone where it reads images too."""
    path = root(directory) / "config.json"
    if not Path(directory).is_dir():
        raise UserError(
            f"there is no directory {directory}; a checkpoint of the Hub comes with: "
            "hf download OWNER/NAME --local-dir DIR"
        )
    if not path.exists():
        raise UserError(f"{directory} is not a model checkpoint: it has no config.json")
    try:
        return hub_source(path.parent)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def inference_dtype(directory: str | Path, dtype: str = "auto") -> str:
    """The dtype in which the weights of a checkpoint lie in memory for inference. "auto" is the
    dtype of its stored weights; on CPUs, which compute in few other dtypes fast, it is float32.
    UserError for one that is not known."""
    if dtype != "auto":
        if dtype not in WEIGHTS_DTYPES:
            raise UserError(
                f"dtype must be auto or one of {', '.join(WEIGHTS_DTYPES)}; got {dtype}"
            )
        return dtype
    return "float32" if jax.default_backend() == "cpu" else stored_dtype(directory)


def stored_dtype(directory: str | Path) -> str:
    """The dtype of a checkpoint's weights; float32 if they have several, or float64."""
    config, kind = _shape_and_family(directory)
    return Weights(directory, kind, config).dtype


def load_parameters(
    directory: str | Path, config: ModelConfig, shardings: Any = None, dtype: str = "float32"
) -> dict[str, Any]:
    """The weights of a checkpoint on devices, in `dtype`. Each shard is read once and placed before
    the next one is read, so that the host holds one at a time. shardings: one for each parameter;
    None puts all on the first device. UserError lists missing, unknown and misshapen tensors."""
    if shardings is None:
        single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: single, shapes(config))
    placed = by_path(shardings)
    weights = Weights(directory, _shape_and_family(directory)[1], config)

    def place(path: str, shape: tuple[int, ...]) -> jax.Array:
        devices: dict[tuple[Range, ...], list[Any]] = {}
        for device, index in placed[path].addressable_devices_indices_map(shape).items():
            ranges = tuple(part.indices(size)[:2] for part, size in zip(index, shape))
            devices.setdefault(ranges, []).append(device)
        arrays = []
        for ranges, holders in devices.items():
            shard = weights.part(path, ranges, np.dtype(dtype))
            arrays += [jax.device_put(shard, device) for device in holders]
            jax.block_until_ready(arrays)  # until then the host's copy is kept
        return jax.make_array_from_single_device_arrays(shape, placed[path], arrays)

    # The largest first: a host that is also the device has most free memory then.
    wanted = {path: leaf.shape for path, leaf in by_path(shapes(config)).items()}
    order = sorted(wanted.items(), key=lambda item: -math.prod(item[1]))
    return unflatten_dict({path: place(path, shape) for path, shape in order}, sep="/")


def read_for_inference(
    directory: str | Path, config: ModelConfig, dtype: str = "float32"
) -> dict[str, Any]:
    """The weights of a checkpoint on the host, in the layout `for_inference`, as they are stored
    where weights have this dtype (`narrowed`)."""
    weights = Weights(directory, _shape_and_family(directory)[1], config)
    paths = by_path(shapes(config))

    def read(layer: int | None) -> dict[str, Any]:
        found = {
            path.removeprefix("blocks/"): weights.for_inference(path, layer, dtype)
            for path in paths
            if stacked(path) == (layer is not None)
        }
        return unflatten_dict(found, sep="/")

    return {**read(None), "blocks": tuple(read(layer) for layer in range(config.layer_count))}


def read_embedding(directory: str | Path, dtype: str = "float32") -> np.ndarray:
    """The embedding of a checkpoint on the host [V, D], as a model whose weights have this dtype
    reads it."""
    config, kind = _shape_and_family(directory)
    return whole(Weights(directory, kind, config).for_inference("embedding", None, dtype))


def write_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    parameters: Mapping[str, Any],
    *,
    like: str | Path | None = None,
    source: Mapping[str, Any] | None = None,
    model_type: str | None = None,
    special_ids: Mapping[str, int] | None = None,
    tokenizer: str | Path | None = None,
    extra: Sequence[Path] = (),
    dtype: str | None = None,
    writes: bool = True,
) -> None:
    """Writes a checkpoint completely or not at all: `directory` appears by a rename once every byte
    is on disk.

    `like`, another checkpoint, gives config.json (with model_type and special ids) and the files
    that travel with weights. Without it these files come from the directory `tokenizer`, and
    config.json is `source`, or is made for `model_type` (None: the first that can express the
    shape) with `special_ids` ("bos_token_id" and so on). Files in `extra` are copied too. dtype:
    dtype of the weights; None leaves them as they are. writes: False on hosts that only take part
    in gathering parameters, which are spread over several hosts, for the one that writes."""
    if like is not None:
        source, tokenizer = read_hub_config(like), like
    if source is None:
        source = {**hub_config(model_type or writable_as(config), config), **(special_ids or {})}
    flat = by_path(parameters)
    dtype = dtype or str(flat["embedding"].dtype)
    source = _in_dtype(source, dtype)
    hub = auto_config(source)
    if misfits := differences(config, shape_of(hub)):
        raise UserError(f"{like or 'config.json'} is of another shape: {', '.join(misfits[:5])}")
    kind = hub_family(hub)
    tensors = stored_tensors(kind, config, flat, dtype)
    try:
        if writes:
            with all_or_nothing(Path(directory)) as partial:
                write_json(partial / "config.json", source)
                if tokenizer is not None:
                    copy_companions(tokenizer, partial)
                write_weights(partial, kind, config, flat, dtype, tensors)
                for path in extra:
                    shutil.copyfile(path, partial / path.name)
    finally:
        if jax.process_count() > 1:
            # The other hosts wait for this one at each tensor, even if it has failed.
            for _ in tensors:
                pass


def write_adapted(
    directory: str | Path,
    base: str | Path,
    adapter: Adapter,
    *,
    base_name: str | None = None,
    extra: Sequence[Path] = (),
) -> None:
    """Writes an adapter of the checkpoint `base` as a directory that stands for the adapted model:
    the files of PEFT, the name of the base with its hashes, and the base's terms of use; completely
    or not at all. base_name: name of the base for PEFT; None: its path. extra: as in
    `write_checkpoint`."""
    config, kind = _shape_and_family(base)
    with all_or_nothing(Path(directory)) as partial:
        write_base(partial, Path(directory), base)
        name = base_name or read_object(partial / BASE)["base"]
        write_adapter(partial, config, kind, adapter, base=name)
        for name in companions(root(base)):
            if name.lower().startswith(LICENCES):
                shutil.copyfile(root(base) / name, partial / name)
        for path in extra:
            shutil.copyfile(path, partial / path.name)


def read_chain_adapter(directory: str | Path) -> dict[str, Product]:
    """The changes of all adapters from a directory down to the complete checkpoint at the end of
    its chain of bases, as one adapter of that. UserError where a directory in between replaces
    whole tensors."""
    _, kind = _shape_and_family(directory)
    products: dict[str, Product] = {}
    for folder in reversed(chain(directory)[:-1]):
        if other := [name for name in own_weight_files(folder) if name not in ADAPTER_FILES]:
            raise UserError(f"{folder} replaces whole tensors ({other[0]}), which no adapter does")
        products = chained(products, read_products(folder, kind))
    if not products:
        raise UserError(f"{directory} is a complete checkpoint, and no adapter of another one")
    return products


def check_checkpoint(directory: str | Path) -> ModelConfig:
    """The shape of a checkpoint; UserError unless its weights exist and match its config.json."""
    config, kind = _shape_and_family(directory)
    Weights(directory, kind, config)
    return config


def write_whole(source: str | Path, directory: str | Path) -> None:
    """Writes what a checkpoint directory stands for as a complete checkpoint, with the tokenizer
    and in the dtype of the checkpoint at the end of its chain of bases. The host holds one tensor
    at once."""
    config, kind = _shape_and_family(source)
    weights = Weights(source, kind, config)
    with all_or_nothing(Path(directory)) as partial:
        write_json(partial / "config.json", _in_dtype(read_hub_config(source), weights.dtype))
        copy_companions(root(source), partial)
        weights.copy(partial, weights.dtype)


def _in_dtype(source: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The contents of config.json for weights in a dtype."""
    # Its older name is left out.
    return {k: v for k, v in source.items() if k != "torch_dtype"} | {"dtype": dtype}


def copy_checkpoint(
    source: str | Path,
    directory: str | Path,
    save_tokenizer: Callable[[Path], object],
    *,
    card_in: Path | None = None,
) -> None:
    """Copies the files of a checkpoint byte for byte, all of them or none. UserError if its weights
    do not match its config.json; other files of `source` are not copied. save_tokenizer: writes
    tokenizer.json into a folder, for a checkpoint that has none. A directory that stores
    differences from a base becomes a complete checkpoint (`write_whole`), and a model that reads
    images too its text model alone, whose tensors keep every bit. card_in: folder of its README.md,
    if that does not lie beside its weights."""
    config, kind = _shape_and_family(source)
    weights = Weights(source, kind, config)
    if (Path(source) / BASE).is_file():
        write_whole(source, directory)
        return
    with all_or_nothing(Path(directory)) as partial:
        # It states the seed's licence, which the cards of its experts repeat.
        card = next((f for f in (Path(source), card_in) if f and (f / README).is_file()), None)
        if card is not None:
            shutil.copyfile(card / README, partial / README)
        others = []
        if takes_images(source):
            write_json(partial / "config.json", read_hub_config(source))
            weights.copy(partial)
        else:
            for name in weight_files(source):
                shutil.copyfile(Path(source) / name, partial / name)
            others += ["config.json", *(() if (partial / WEIGHTS).exists() else (INDEX,))]
        for name in others:
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, partial / name)
        copy_companions(source, partial)
        if not (partial / "tokenizer.json").exists():
            save_tokenizer(partial)


@contextmanager
def all_or_nothing(target: Path) -> Iterator[Path]:
    """Yields a folder to write into; it becomes `target` by a rename once all of it is on disk."""
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
