"""Checkpoints and adapters that somebody else made: checked against the shape of a RUN's models,
and copied without any code. Only configurations, safetensors and tokenizer files are read."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy, where safetensors looks it up
import numpy as np
from safetensors import safe_open

from clustering.errors import UserError
from clustering.files import read_object, write_json
from clustering.hub_files import INDEX, LICENCES, weight_files
from xelm.models.checkpoint import (
    all_or_nothing,
    check_checkpoint,
    copy_checkpoint,
    family_of,
    read_config,
    read_hub_config,
)
from xelm.models.companions import TOKENIZER_FILES, companions, copy_companions
from xelm.models.config import ModelConfig
from xelm.models.families import differences, takes_images
from xelm.models.peft import ADAPTER_FILES, CONFIG, FACTORS, read_products
from xelm.models.stored import write_base
from xelm.models.tensor_file import TensorKind, write_tensors
from xelm.models.weights import NARROW, tensor_without_numbers

_NAMES = NARROW | {"F32": "float32", "F64": "float64"}
_CODE = "auto_map"
"""Key of config.json that names Python files of the checkpoint."""


def faults_of(directory: str | Path, wanted: ModelConfig) -> list[str]:
    """What is wrong with a checkpoint that is to stand beside models of a shape, one line each:
    another shape, tensors that are missing, unknown or misshapen, and values that are not finite.
    UserError if it cannot be read as a checkpoint at all."""
    directory = Path(directory)
    shape = read_config(directory)
    if misfits := differences(shape, wanted):
        more = f" (and {len(misfits) - 5} more)" if len(misfits) > 5 else ""
        return [f"{directory} is of another shape: {', '.join(misfits[:5])}{more}"]
    faults = []
    try:
        check_checkpoint(directory)
    except UserError as error:
        faults.append(str(error))
    for name in weight_files(directory):
        if (tensor := tensor_without_numbers(directory / name)) is not None:
            faults.append(f"{tensor} in {directory / name} has NaN or infinite values")
    return faults


def code_of(directory: str | Path) -> list[str]:
    """Names of files with code beside a checkpoint, none of which is run or copied."""
    named = read_hub_config(directory).get(_CODE)
    found = [path.name for path in sorted(Path(directory).glob("*.py"))]
    return found or ([f"{_CODE} of config.json"] if named else [])


def files_of(directory: str | Path) -> list[str]:
    """Names of the files that make the weights of a checkpoint, or an adapter."""
    return list(ADAPTER_FILES) if is_adapter(directory) else weight_files(directory)


def dtypes_of(directory: str | Path) -> tuple[str, ...]:
    """Names of the dtypes of the tensors of a checkpoint or an adapter, as in NumPy, sorted."""
    found = set()
    for name in files_of(directory):
        if name == CONFIG:
            continue
        with safe_open(Path(directory) / name, framework="np") as file:
            kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            found |= {_NAMES.get(kind, kind) for kind in kinds}
    return tuple(sorted(found))


def copy_foreign(
    source: str | Path,
    directory: Path,
    like: str | Path,
    *,
    dtype: str | None = None,
    extra: Sequence[Path] = (),
) -> None:
    """Copies a checkpoint into the new folder `directory`, all of it or nothing: its weights byte
    for byte or, if a dtype is given, each rounded to it once (of a model that reads images too,
    those of its text model); config.json without references to code; its tokenizer, or that of the
    checkpoint `like` if it brings none; its terms of use; and the files in `extra`."""
    source = Path(source)
    if takes_images(source):
        with TemporaryDirectory(dir=directory.parent) as folder:
            text = Path(folder) / "text"
            copy_checkpoint(source, text, lambda target: None)
            copy_foreign(text, directory, like, dtype=dtype, extra=extra)
        return
    config = {key: value for key, value in read_hub_config(source).items() if key != _CODE}
    if dtype is not None:
        config = {key: value for key, value in config.items() if key != "torch_dtype"}
        config["dtype"] = dtype
    with all_or_nothing(directory) as partial:
        write_json(partial / "config.json", config)
        if not any((source / name).is_file() for name in TOKENIZER_FILES[:1]):
            copy_companions(like, partial)
        copy_companions(source, partial)
        if dtype is None:
            for name in weight_files(source):
                shutil.copyfile(source / name, partial / name)
            if len(weight_files(source)) > 1:
                shutil.copyfile(source / INDEX, partial / INDEX)
        else:
            _write_rounded(source, partial, dtype)
        for path in extra:
            shutil.copyfile(path, partial / path.name)


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory has an adapter of PEFT alone."""
    directory = Path(directory)
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def check_adapter(directory: str | Path, base: str | Path) -> str:
    """Describes an adapter of PEFT for the model of another directory; UserError for one that is
    no plain LoRA, that changes what the base does not have, or that has values that are not
    finite."""
    directory = Path(directory)
    with TemporaryDirectory() as folder:
        place = Path(folder) / "adapter"
        place.mkdir()
        _copy_adapter(directory, place, place, base)
        check_checkpoint(place)
    if (tensor := tensor_without_numbers(directory / FACTORS)) is not None:
        raise UserError(f"{tensor} in {directory / FACTORS} has NaN or infinite values")
    products = read_products(directory, family_of(base))
    ranks = sorted({len(each.a) for each in products.values()})
    targets = sorted({name.rpartition(".")[2] for name in products})
    return f"LoRA of rank {' and '.join(map(str, ranks))} on {', '.join(targets)}"


def declared_base(directory: str | Path) -> str:
    """Name or path of the model that an adapter of PEFT says it is for; empty if it says none."""
    found = read_object(Path(directory) / CONFIG).get("base_model_name_or_path")
    return found if isinstance(found, str) else ""


def copy_adapter(
    source: str | Path, directory: Path, base: str | Path, *, extra: Sequence[Path] = ()
) -> None:
    """Copies an adapter of PEFT byte for byte into the new folder `directory`, all of it or
    nothing, as what a model differs in from its base; with its terms of use and the files in
    `extra`."""
    source = Path(source)
    with all_or_nothing(directory) as partial:
        _copy_adapter(source, partial, directory, base)
        for name in companions(source):
            if name.lower().startswith(LICENCES):
                shutil.copyfile(source / name, partial / name)
        for path in extra:
            shutil.copyfile(path, partial / path.name)


def _copy_adapter(source: Path, partial: Path, place: Path, base: str | Path) -> None:
    for name in ADAPTER_FILES:
        if not (source / name).is_file():
            raise UserError(f"{source} has no {name}; adapters in other files can run code")
        shutil.copyfile(source / name, partial / name)
    write_base(partial, place, base)


def _write_rounded(source: Path, partial: Path, dtype: str) -> None:
    """Writes the tensors of a checkpoint in a dtype, one after the other."""
    homes = {}
    for name in weight_files(source):
        file = safe_open(source / name, framework="np")
        homes |= dict.fromkeys(file.keys(), file)
    kinds = {
        name: TensorKind.of(dtype, file.get_slice(name).get_shape()) for name, file in homes.items()
    }
    tensors = (_rounded(name, file.get_tensor(name), dtype) for name, file in homes.items())
    write_tensors(partial, kinds, tensors)


def _rounded(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # checked below
        found = np.ascontiguousarray(tensor.astype(dtype))
    if not np.isfinite(found.astype(np.float32)).all():
        raise UserError(f"{name} has values beyond the range of {dtype}, the dtype of the RUN")
    return found
