"""Hugging Face checkpoints in and out: config.json and safetensors, never a pickle.

Parameters travel as a nested dictionary of arrays, stacked over layers, with dense weights as
[inputs, outputs] (the Hub has [outputs, inputs], one tensor a layer).
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clustering.errors import UserError
from clustering.files import flush, read_object, write_json
from xelm.models.config import ModelConfig
from xelm.models.families import family, hub_config, model_config
from xelm.models.families.family import Family, Tensor
from xelm.models.layout import Range, join, stored_shape, take
from xelm.models.transformer import Transformer

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Of two large tables, at once.
ROWS_COMPARED = 4096
# Of weights, as safetensors calls them.
DTYPES = ("F32", "BF16", "F16", "F64")
# Of one file of weights; more go into several, as the Hub likes them.
SHARD_BYTES = 5 * 10**9
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
    config.json and tokenizer files; otherwise config.json is written afresh and is all there is."""
    write_checkpoint(directory, model.config, parameters_of(model), like=like)


def graph(config: ModelConfig, compute_dtype: str = "float32") -> nnx.GraphDef:
    """The model without parameters; allocates nothing."""
    return nnx.split(_abstract(config, compute_dtype))[0]


def bind(network: nnx.GraphDef, parameters: Mapping[str, Any]) -> Transformer:
    """The model with these parameters."""
    return nnx.merge(network, nnx.State(cast(Any, jax.tree.map(nnx.Param, parameters))))


def parameters_of(model: Transformer) -> dict[str, Any]:
    """The model's parameters as a nested dictionary of arrays."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def shapes(config: ModelConfig) -> dict[str, Any]:
    """The nested dictionary of parameters as shapes; allocates nothing."""
    return parameters_of(_abstract(config, "float32"))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """The nested dictionary of parameters with the names of each one's dimensions."""
    state = nnx.state(_abstract(config, "float32"), nnx.Param)
    named = jax.tree.map(
        lambda p: p.get_metadata()["axes"], state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return nnx.to_pure_dict(named)


def fresh_parameters(
    config: ModelConfig, random_seed: int, shardings: Any = None
) -> dict[str, Any]:
    """Random parameters of a model that is trained from nothing, float32, on the devices that
    `shardings` (of each parameter) say, by default the first."""
    make = jax.jit(
        lambda key: parameters_of(Transformer(config, nnx.Rngs(key))), out_shardings=shardings
    )
    return make(jax.random.key(random_seed))


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
    placed = _flat(shardings)
    read = _reader(directory, config, np.dtype(dtype))

    def place(path: str, shape: tuple[int, ...]) -> jax.Array:
        devices: dict[tuple[Range, ...], list[Any]] = {}
        for device, index in placed[path].addressable_devices_indices_map(shape).items():
            devices.setdefault(_ranges(index, shape), []).append(device)
        arrays = []
        for ranges, holders in devices.items():
            shard = read(path, ranges)
            arrays += [jax.device_put(shard, device) for device in holders]
            jax.block_until_ready(arrays)  # until then the host's copy is kept
        return jax.make_array_from_single_device_arrays(shape, placed[path], arrays)

    # The largest first: a host that is also the device has most room then.
    wanted = {path: leaf.shape for path, leaf in _flat(shapes(config)).items()}
    order = sorted(wanted.items(), key=lambda item: -math.prod(item[1]))
    return unflatten_dict({path: place(path, shape) for path, shape in order}, sep="/")


def _reader(
    directory: str | Path, config: ModelConfig, dtype: np.dtype
) -> Callable[[str, Sequence[Range]], np.ndarray]:
    """A function that reads a part of a parameter."""
    kind = family(read_hub_config(directory)["model_type"])
    wanted = {path: leaf.shape for path, leaf in _flat(shapes(config)).items()}
    stored = _renamed(kind, _open(directory))
    held = _compare(directory, kind, wanted, config, stored)
    homes = {path: (name, tensor) for name, tensor in held.items() for path in tensor.paths}
    layers = _layer_shapes(wanted)

    def read(path: str, ranges: Sequence[Range]) -> np.ndarray:
        name, tensor = homes[path]
        if "{}" not in name:
            found = take(stored[name], tensor, path, layers, ranges, config.head_size)
            return np.ascontiguousarray(found, dtype)
        (first, last), rest = ranges[0], ranges[1:]
        target = np.empty((last - first, *(b - a for a, b in rest)), dtype)
        for layer in range(first, last):
            if name.format(layer) in stored:
                source = stored[name.format(layer)]
                found = take(source, tensor, path, layers, rest, config.head_size)
                target[layer - first] = found
            else:  # the norm that the first layer may lack; nothing reads it
                target[layer - first] = 1 - config.norm_offset
        return target

    return read


def _ranges(index: Sequence[slice], shape: Sequence[int]) -> tuple[Range, ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape))


def write_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    parameters: Mapping[str, Any],
    *,
    like: str | Path | None = None,
    model_type: str = "llama",
    special_ids: Mapping[str, int] | None = None,
    tokenizer: str | Path | None = None,
    extra: Sequence[Path] = (),
) -> None:
    """Writes `directory` whole or not at all: it appears by a rename once every byte is on disk.

    `like` gives config.json (with model_type and special ids) and tokenizer files; without it the
    config is written for `model_type` with `special_ids` ("bos_token_id" and so on), and the
    tokenizer files come from the directory `tokenizer`. Files in `extra` are copied in beside them.
    """
    with _whole_or_nothing(Path(directory)) as partial:
        if like is None:
            source = {**hub_config(model_type, config), **(special_ids or {})}
            if tokenizer is not None:
                copy_tokenizer(tokenizer, partial)
        else:
            source = read_hub_config(like)
            copy_tokenizer(like, partial)
        flat = _flat(parameters)
        source.pop("torch_dtype", None)  # its older name
        source["dtype"] = str(flat["embedding"].dtype)
        write_json(partial / "config.json", source)
        _write_weights(partial, family(source["model_type"]), config, flat)
        for path in extra:
            shutil.copyfile(path, partial / path.name)


def check_checkpoint(directory: str | Path) -> ModelConfig:
    """The shape of a checkpoint whose weights are there and match its config.json."""
    config, kind = read_config(directory), family(read_hub_config(directory)["model_type"])
    wanted = {path: leaf.shape for path, leaf in _flat(shapes(config)).items()}
    _compare(directory, kind, wanted, config, _renamed(kind, _open(directory)))
    return config


def copy_checkpoint(
    source: str | Path, directory: str | Path, save_tokenizer: Callable[[Path], object]
) -> None:
    """Copies what a checkpoint consists of, byte for byte, whole or not at all. Weights that do
    not match its config.json are refused; other files of `source` stay behind. save_tokenizer:
    writes tokenizer.json into a folder, for a checkpoint that has none."""
    check_checkpoint(source)
    with _whole_or_nothing(Path(directory)) as partial:
        for name in _files(Path(source)):
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


def _files(directory: Path) -> list[str]:
    """Names of the files that hold a checkpoint's weights: one, or those of an index."""
    if (directory / INDEX).is_file():
        shards = read_object(directory / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise UserError(
                f'{directory / INDEX} wants a "weight_map" of tensors to files; got {shards!r:.40}'
            )
        names = sorted(set(shards.values()))
        if any(Path(name).name != name for name in names):
            raise UserError(f"{directory / INDEX} names files elsewhere: {', '.join(names[:5])}")
        return names
    if (directory / WEIGHTS).is_file():
        return [WEIGHTS]
    pickled = " (its .bin files can run code and are not read: convert them to safetensors)"
    hint = pickled if list(directory.glob("*.bin")) else ""
    raise UserError(f"{directory} has no weights: {WEIGHTS} is missing{hint}")


def _open(directory: str | Path) -> dict[str, Any]:
    """Tensor name -> lazy slice of it, over one file or several."""
    readers = {}
    for name in _files(Path(directory)):
        path = Path(directory) / name
        try:
            file = safe_open(path, framework="np")
        except Exception as error:
            raise UserError(f"{path} is not readable as safetensors: {error}") from error
        for key in file.keys():  # noqa: SIM118 (not a dictionary)
            readers[key] = file.get_slice(key)
    return readers


def _renamed(kind: Family, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The same by the names of the family's table."""
    prefixed = any(name.startswith(kind.prefix) for name in stored)
    return {kind.name(name, prefixed): value for name, value in stored.items()}


def _compare(
    directory: str | Path,
    kind: Family,
    wanted: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
    stored: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The tensors of the family's table that hold these parameters, all of which are stored."""
    held = _held(kind, wanted)
    layers = _layer_shapes(wanted)
    expected = {name: tensor for name, _, tensor in _named(held, config)}
    copies = dict(kind.copies)
    if config.tie_embeddings:
        heads = (name for name, tensor in kind.tensors.items() if tensor.paths == ("head",))
        copies |= dict.fromkeys(heads, _name_of(held, "embedding"))
    unknown = [
        name
        for name in stored
        if name not in expected
        and name not in copies
        and not any(part in name for part in kind.ignored)
    ]
    faults = [f"missing {name}" for name in expected if name not in stored]
    faults += [f"unknown {name}" for name in unknown]
    for name, tensor in expected.items():
        if name in stored:
            shape, found = stored_shape(tensor, layers), tuple(stored[name].get_shape())
            if found != shape:
                faults.append(f"{name} has shape {found}, config.json says {shape}")
            if (values := stored[name].get_dtype()) not in DTYPES:
                faults.append(f"{name} has values of type {values}; wanted {', '.join(DTYPES)}")
    if not faults:
        faults += [
            f"{name} is not the same as {other}, to which it is tied"
            for name, other in copies.items()
            if name in stored and not _equal(stored[name], stored[other])
        ]
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise UserError(
            f"{directory} does not match its config.json: {'; '.join(faults[:5])}{more}"
        )
    return held


def _name_of(held: Mapping[str, Tensor], path: str) -> str:
    return next(name for name, tensor in held.items() if tensor.paths == (path,))


def _equal(one: Any, other: Any) -> bool:
    """Of two lazy tables, a part at a time."""
    if one.get_shape() != other.get_shape():
        return False
    rows = one.get_shape()[0]
    parts = (slice(a, min(a + ROWS_COMPARED, rows)) for a in range(0, rows, ROWS_COMPARED))
    return all(np.array_equal(one[part], other[part]) for part in parts)


def _held(kind: Family, paths: Mapping[str, Any]) -> dict[str, Tensor]:
    """The rows of the family's table that hold these parameters, all of which have one."""
    held = {name: t for name, t in kind.tensors.items() if all(path in paths for path in t.paths)}
    homeless = set(paths) - {path for tensor in held.values() for path in tensor.paths}
    if homeless:
        raise UserError(f"no tensor of this family holds {', '.join(sorted(homeless)[:5])}")
    return held


def _named(
    held: Mapping[str, Tensor], config: ModelConfig
) -> Iterator[tuple[str, int | None, Tensor]]:
    """Name in the checkpoint, layer and row of the table of every tensor that is stored."""
    for name, tensor in held.items():
        if "{}" not in name:
            yield name, None, tensor
            continue
        absent = not config.first_norm and tensor.paths[0].startswith("blocks/attention_norm/")
        for layer in range(1 if absent else 0, config.layer_count):
            yield name.format(layer), layer, tensor


def _layer_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters, stacked ones without their layers."""
    return {
        path: shape[1:] if path.startswith("blocks/") else shape for path, shape in shapes.items()
    }


def _write_weights(
    directory: Path, kind: Family, config: ModelConfig, flat: Mapping[str, Any]
) -> None:
    """One file, or several with an index where there is more than `SHARD_BYTES`; the host holds
    the tensors of one file at once."""
    sizes = _layer_shapes({path: value.shape for path, value in flat.items()})
    rows = list(_named(_held(kind, flat), config))
    files: list[list[tuple[str, int | None, Tensor]]] = [[]]
    room = SHARD_BYTES
    for row in rows:
        size = math.prod(stored_shape(row[2], sizes)) * flat[row[2].paths[0]].dtype.itemsize
        if files[-1] and size > room:
            files.append([])
            room = SHARD_BYTES
        files[-1].append(row)
        room -= size
    names = [WEIGHTS]
    if len(files) > 1:
        names = [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
        total = sum(value.nbytes for value in flat.values())
        homes = {row[0]: name for name, part in zip(names, files) for row in part}
        write_json(
            directory / INDEX,
            {"metadata": {"total_size": total}, "weight_map": homes},
        )
    for file, part in zip(names, files):
        tensors = {}
        for name, layer, tensor in part:
            whole = [flat[path] for path in tensor.paths]
            arrays = [np.asarray(a if layer is None else a[layer]) for a in whole]
            tensors[name] = join(tensor, arrays, config.head_size)
        save_file(tensors, directory / file, metadata={"format": "pt"})
        # The library writes for its user alone, whatever the umask says.
        shutil.copymode(directory / "config.json", directory / file)


def _abstract(config: ModelConfig, compute_dtype: str) -> Transformer:
    return nnx.eval_shape(
        lambda: Transformer(config, nnx.Rngs(0), compute_dtype=jnp.dtype(compute_dtype))
    )


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Path, with slashes -> leaf."""
    return cast(dict[str, Any], flatten_dict(tree, sep="/"))
