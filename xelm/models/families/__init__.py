"""How the checkpoints of each model family on the Hub map to `ModelConfig` and to our parameters.
Imports no JAX."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clustering.errors import UserError
from clustering.files import read_object, write_json
from xelm.models.config import ModelConfig
from xelm.models.families.apertus import APERTUS
from xelm.models.families.bert import BERT, CAMEMBERT, ROBERTA, XLM_ROBERTA
from xelm.models.families.bloom import BLOOM
from xelm.models.families.cohere import COHERE, COHERE2
from xelm.models.families.eurobert import EUROBERT
from xelm.models.families.falcon import FALCON
from xelm.models.families.family import Family
from xelm.models.families.gemma import GEMMA2, GEMMA3
from xelm.models.families.gpt2 import GPT2
from xelm.models.families.gpt_neox import GPT_NEOX
from xelm.models.families.granite import GRANITE
from xelm.models.families.hunyuan import HUNYUAN
from xelm.models.families.llama import LLAMA, MINISTRAL, MINISTRAL3, MISTRAL, MIXTRAL, QWEN2, QWEN3
from xelm.models.families.modernbert import MODERNBERT
from xelm.models.families.moe import OLMOE, QWEN3_MOE
from xelm.models.families.multimodal import WITH_IMAGES, beside_images, text_config, text_source
from xelm.models.families.olmo import OLMO2, OLMO3
from xelm.models.families.opt import OPT
from xelm.models.families.phi3 import PHI3
from xelm.models.families.smollm import SMOLLM3
from xelm.models.families.stablelm import STABLELM
from xelm.models.families.xglm import XGLM

FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "ministral": MINISTRAL,
    "ministral3": MINISTRAL3,
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "phi3": PHI3,
    "smollm3": SMOLLM3,
    "apertus": APERTUS,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "olmoe": OLMOE,
    "cohere": COHERE,
    "cohere2": COHERE2,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "xglm": XGLM,
    "bloom": BLOOM,
    "gpt2": GPT2,
    "granite": GRANITE,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
    "falcon": FALCON,
    "stablelm": STABLELM,
    "hunyuan_v1_dense": HUNYUAN,
    "bert": BERT,
    "roberta": ROBERTA,
    "camembert": CAMEMBERT,
    "xlm-roberta": XLM_ROBERTA,
    "modernbert": MODERNBERT,
    "eurobert": EUROBERT,
}


_GEMMA4 = (
    "its layers are of different shapes (heads of 512 in global layers and of 256 in local ones, "
    "and layers without keys of their own or with feed-forwards of twice the width), and it has "
    "inputs for each layer and norms of values, none of which is supported; take a Gemma 3, such "
    "as google/gemma-3-4b-pt"
)
_QWEN35 = (
    "three of four of its layers are gated delta nets (linear_attention), which are not "
    "supported; take a Qwen 3, such as Qwen/Qwen3-4B-Base"
)
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _GEMMA4),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _QWEN35),
    "qwen3_next": _QWEN35,
}
"""What other families lack here, by `model_type`, and what to take instead."""


def family(model_type: Any) -> Family:
    """The family with this `model_type`; UserError if it is not known."""
    if isinstance(model_type, str) and model_type in REFUSED:
        raise UserError(f"model_type {model_type!r}: {REFUSED[model_type]}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"model_type {model_type!r} is not known; known: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def hub_family(hub: Any) -> Family:
    """The family of a configuration of transformers."""
    kind = family(hub.model_type)
    return kind if kind.variant is None else kind.variant(hub)


def takes_images(directory: str | Path) -> bool:
    """Whether a checkpoint directory has a model that reads images too."""
    return read_object(Path(directory) / "config.json").get("model_type") in WITH_IMAGES


def family_in(directory: str | Path, hub: Any) -> Family:
    """The family of a checkpoint directory with this configuration of transformers."""
    found = hub_family(hub)
    return beside_images(found) if takes_images(directory) else found


def hub_source(directory: str | Path) -> dict[str, Any]:
    """The contents of the config.json of a checkpoint directory; of a model that reads images too,
    those of its text model."""
    source = read_object(Path(directory) / "config.json")
    if source.get("model_type") not in WITH_IMAGES:
        return source
    return text_source(source, read_auto_config(directory))


def read_auto_config(directory: str | Path) -> Any:
    """The configuration that transformers' Auto classes make of a checkpoint directory; of a model
    that reads images too, that of its text model. Its family must be known here. Defaults, nulls,
    older names and the choice of the family thus have the same meaning as there. Code in the
    directory is never run."""
    from transformers import AutoConfig

    directory = Path(directory)
    source = read_object(directory / "config.json")
    if (kind := source.get("model_type")) not in WITH_IMAGES:
        family(kind)
    for name in ("configuration_files", "transformers_weights"):
        if source.get(name):
            raise UserError(f"{name} is not read; config.json has {source[name]}")
    try:
        found = AutoConfig.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers' checks have no common type
        raise UserError(" ".join(str(error.__cause__ or error).split())) from error
    if found.model_type in WITH_IMAGES:
        found = text_config(found, directory, source)
    family(found.model_type)
    return found


def shape_of(hub: Any) -> ModelConfig:
    """The shape that a configuration of transformers stands for."""
    try:
        return family(hub.model_type).read(hub)
    except UserError:
        raise
    except Exception as error:  # settings that contradict each other
        raise UserError(" ".join(str(error).split())) from error


def model_config(source: Mapping[str, Any]) -> ModelConfig:
    """The shape that the contents of a config.json stand for."""
    return shape_of(auto_config(source))


def auto_config(source: Mapping[str, Any]) -> Any:
    """The configuration that transformers makes of the contents of a config.json."""
    with TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", dict(source))
        return read_auto_config(folder)


def writable_as(config: ModelConfig) -> str:
    """The first model_type whose config.json can express a shape; UserError if there is none."""
    for model_type, kind in FAMILIES.items():
        if kind.write is not None:
            try:
                hub_config(model_type, config)
            except UserError:
                continue
            return model_type
    raise UserError(
        "no config.json is made afresh for a model of this shape; name a checkpoint of the same "
        "shape, such as the one it was loaded from, with like="
    )


def hub_config(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """Contents of config.json for a new model; UserError for what this family cannot express."""
    kind = family(model_type)
    if kind.write is None:
        written_ones = ", ".join(name for name, known in FAMILIES.items() if known.write)
        raise UserError(f"fresh models are made as {written_ones}; got {model_type}")
    written = kind.write(config)
    try:
        back = model_config(written)
    except UserError as error:
        raise UserError(f"model_type {model_type}: {error}") from None
    if misfits := differences(config, back):
        more = f" (and {len(misfits) - 3} more)" if len(misfits) > 3 else ""
        raise UserError(f"model_type {model_type} does not go with {', '.join(misfits[:3])}{more}")
    return written


def differences(config: ModelConfig, wanted: ModelConfig) -> list[str]:
    """The settings in which a shape differs from another, each with both values."""
    other = asdict(wanted)
    return [
        f"model.{name}={value} (wanted {other[name]})"
        for name, value in asdict(config).items()
        if value != other[name]
    ]
