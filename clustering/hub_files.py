"""The files of a Hugging Face checkpoint directory: weights, their index, chat templates, licences.

Weights are not opened here. Licences and other terms apply to everybody who distributes the
weights."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from clustering.errors import UserError
from clustering.files import read_object, write_json

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
"""Name of the file that maps tensors to files, where there are several files of weights."""
SHARD_BYTES = 5 * 10**9
"""Largest size of one file of weights, as on the Hub; more weights go into several files."""
TEMPLATES = "additional_chat_templates"
"""Folder in which transformers has further chat templates, NAME.jinja."""
LICENCES = ("license", "licence", "notice", "copying", "use_policy")
"""Beginnings of names of files with terms of use, in lower case; the first two are licences."""


def weight_files(directory: Path | str) -> list[str]:
    """Names of a checkpoint's files of weights: one, or those in its index; UserError without
    any."""
    directory = Path(directory)
    if (directory / WEIGHTS).is_file():  # before an index, as in transformers
        return [WEIGHTS]
    index = directory / INDEX
    if not index.is_file():
        raise UserError(f"{directory} has no weights: {WEIGHTS} is missing{_advice(directory)}")
    found = read_object(index).get("weight_map")
    names = list(found.values()) if isinstance(found, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f'{index} must have a "weight_map" of tensors to files; got {found!r:.40}')
    names = sorted(set(names))
    if any(Path(name).name != name for name in names):
        raise UserError(f"{index} names files elsewhere: {', '.join(names[:5])}")
    return names


def split_weights(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """File name -> names of the tensors in it, for tensors of these sizes in bytes, in order."""
    parts: list[list[str]] = [[]]
    for name, size in sizes.items():
        if parts[-1] and size + sum(sizes[other] for other in parts[-1]) > SHARD_BYTES:
            parts.append([])
        parts[-1].append(name)
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    count = len(parts)
    return {f"model-{n:05}-of-{count:05}.safetensors": part for n, part in enumerate(parts, 1)}


def write_index(directory: Path, files: Mapping[str, Iterable[str]], total_bytes: int) -> None:
    """Writes the index of several files of weights, as `split_weights` gives them."""
    homes = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": homes}
    write_json(directory / INDEX, index)


def _advice(directory: Path) -> str:
    """Advice for a checkpoint that has pickles only; empty for others."""
    if not directory.is_dir() or not list(directory.glob("*.bin")):
        return ""
    convert = (
        "from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained('{directory}').save_pretrained('{directory}')"
    )
    return (
        " (its .bin files can run code and are not read). Fetch safetensors: hf download "
        f"OWNER/NAME --include '*.safetensors' --local-dir {directory} (where the main "
        "branch has none, a pull request often has: --revision refs/pr/N). Or convert what you "
        f'trust, with torch: python -c "{convert}" (an encoder: AutoModelForMaskedLM)'
    )
