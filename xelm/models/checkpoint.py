"""Hugging Face checkpoints in and out: config.json and safetensors, never a pickle.

Parameters travel as a nested dictionary of arrays, stacked over layers, with dense weights as
[inputs, outputs] (the Hub has [outputs, inputs], one tensor a layer).
"""

import functools
import json
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
from clustering.files import flush, write_json
from xelm.models.config import ModelConfig
from xelm.models.decoder import Decoder
from xelm.models.families import Family, family, hub_config

WEIGHTS = "model.safetensors"
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
    "chat_template.jinja",
    "generation_config.json",
)


def load_model(directory: str | Path, dtype: str = "float32") -> Decoder:
    """The model of a checkpoint directory, parameters and products in `dtype`."""
    config = read_config(directory)
    # On the device once, not at every call.
    parameters = jax.tree.map(jnp.asarray, read_parameters(directory, config, dtype))
    return bind(graph(config, dtype), parameters)


def save_model(model: Decoder, directory: str | Path, like: str | Path | None = None) -> None:
    """Writes a checkpoint that transformers loads. `like`, a checkpoint of the same shape, gives
    config.json and tokenizer files; otherwise config.json is written afresh and is all there is."""
    write_checkpoint(directory, model.config, parameters_of(model), like=like)


def graph(config: ModelConfig, compute_dtype: str = "float32") -> nnx.GraphDef:
    """The decoder without parameters; allocates nothing."""
    return nnx.split(_abstract(config, compute_dtype))[0]


def bind(decoder: nnx.GraphDef, parameters: Mapping[str, Any]) -> Decoder:
    """The decoder with these parameters."""
    return nnx.merge(decoder, nnx.State(cast(Any, jax.tree.map(nnx.Param, parameters))))


def parameters_of(model: Decoder) -> dict[str, Any]:
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


def fresh_parameters(config: ModelConfig, random_seed: int) -> dict[str, Any]:
    """Random parameters of a model that is trained from nothing, float32."""
    return _maker(config)(jax.random.key(random_seed))


@functools.lru_cache(maxsize=8)
def _maker(config: ModelConfig):
    return jax.jit(lambda key: parameters_of(Decoder(config, nnx.Rngs(key))))


def read_config(directory: str | Path) -> ModelConfig:
    """The shape a checkpoint declares in its config.json."""
    source = read_hub_config(directory)
    try:
        return family(source["model_type"]).read(source)
    except KeyError as error:
        raise UserError(f"{directory}/config.json lacks {error}") from None
    except (UserError, TypeError, ValueError, AttributeError) as error:
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
    return _read_object(path)


def read_parameters(
    directory: str | Path, config: ModelConfig, dtype: str = "float32"
) -> dict[str, Any]:
    """The weights of a checkpoint as host arrays in `dtype`. Missing, unknown and misshapen
    tensors are gathered and refused at once."""
    kind = family(read_hub_config(directory)["model_type"])
    tensors = kind.tensors(config)
    wanted = _flat(shapes(config))
    with _open(directory) as stored:
        _compare(directory, kind, tensors, wanted, config, stored)
        result = {}
        for name, path in tensors.items():
            target = np.empty(wanted[path].shape, jnp.dtype(dtype))
            if "{}" in name:
                for layer in range(config.layer_count):
                    target[layer] = _oriented(path, stored[name.format(layer)][:])
            else:
                target[...] = _oriented(path, stored[name][:])
            result[path] = target
    return unflatten_dict(result, sep="/")


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
        flat = {path: np.asarray(value) for path, value in _flat(parameters).items()}
        source["dtype"] = str(flat["embedding"].dtype)
        write_json(partial / "config.json", source)
        tensors = _unstacked(family(source["model_type"]), config, flat)
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        # The library writes for its user alone, whatever the umask says.
        shutil.copymode(partial / "config.json", partial / WEIGHTS)
        for path in extra:
            shutil.copyfile(path, partial / path.name)


def check_checkpoint(directory: str | Path) -> ModelConfig:
    """The shape of a checkpoint whose weights are there and match its config.json."""
    config, kind = read_config(directory), family(read_hub_config(directory)["model_type"])
    with _open(directory) as stored:
        _compare(
            directory,
            kind,
            kind.tensors(config),
            _flat(shapes(config)),
            config,
            stored,
        )
    return config


def copy_checkpoint(
    source: str | Path, directory: str | Path, save_tokenizer: Callable[[Path], object]
) -> None:
    """Copies what a checkpoint consists of, byte for byte, whole or not at all. Weights that do
    not match its config.json are refused; other files of `source` stay behind. save_tokenizer:
    writes tokenizer.json into a folder, for a checkpoint that has none."""
    check_checkpoint(source)
    with _whole_or_nothing(Path(directory)) as partial:
        for path in sorted(Path(source).glob("*.safetensors*")):
            shutil.copyfile(path, partial / path.name)
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


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} wants a JSON object; got {value!r:.40}")
    return value


@contextmanager
def _open(directory: str | Path) -> Iterator[dict[str, Any]]:
    """Tensor name -> lazy slice of it, over one file or the shards of an index."""
    directory = Path(directory)
    index = directory / f"{WEIGHTS}.index.json"
    if index.is_file():
        shards = _read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise UserError(f'{index} wants a "weight_map" of tensors to files; got {shards!r:.40}')
        names = sorted(set(shards.values()))
    elif (directory / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        pickled = " (its .bin files can run code and are not read: convert them to safetensors)"
        hint = pickled if list(directory.glob("*.bin")) else ""
        raise UserError(f"{directory} has no weights: {WEIGHTS} is missing{hint}")
    readers = {}
    for name in names:
        try:
            file = safe_open(directory / name, framework="np")
        except Exception as error:
            raise UserError(
                f"{directory / name} is not readable as safetensors: {error}"
            ) from error
        for key in file.keys():  # noqa: SIM118 (not a dictionary)
            readers[key] = file.get_slice(key)
    yield readers


def _compare(directory, kind, tensors, wanted, config, stored) -> None:
    expected = {
        name.format(layer): path
        for name, path in tensors.items()
        for layer in (range(config.layer_count) if "{}" in name else [0])
    }
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    unknown = [
        name
        for name in stored
        if name not in expected and name not in tied and not name.endswith(kind.ignored)
    ]
    faults = [f"missing {name}" for name in expected if name not in stored]
    faults += [f"unknown {name}" for name in unknown]
    for name, path in expected.items():
        if name in stored:
            shape = wanted[path].shape[1:] if path.startswith("blocks/") else wanted[path].shape
            shape = shape[::-1] if path.endswith("/weight") else shape
            found = tuple(stored[name].get_shape())
            if found != shape:
                faults.append(f"{name} has shape {found}, config.json says {shape}")
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise UserError(
            f"{directory} does not match its config.json: {'; '.join(faults[:5])}{more}"
        )


def _unstacked(kind: Family, config: ModelConfig, flat: Mapping[str, np.ndarray]):
    tensors = {}
    for name, path in kind.tensors(config).items():
        if "{}" in name:
            for layer in range(config.layer_count):
                tensors[name.format(layer)] = np.ascontiguousarray(
                    _oriented(path, flat[path][layer])
                )
        else:
            tensors[name] = np.ascontiguousarray(flat[path])
    return tensors


def _oriented(path: str, value: np.ndarray) -> np.ndarray:
    """Between the Hub's [outputs, inputs] and our [inputs, outputs], either way."""
    return value.T if path.endswith("/weight") else value


def _abstract(config: ModelConfig, compute_dtype: str) -> Decoder:
    return nnx.eval_shape(
        lambda: Decoder(config, nnx.Rngs(0), compute_dtype=jnp.dtype(compute_dtype))
    )


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Path, with slashes -> leaf."""
    return cast(dict[str, Any], flatten_dict(tree, sep="/"))
