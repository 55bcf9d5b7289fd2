"""How the checkpoints of each model family on the Hub map to `ModelConfig` and to our parameters.
Imports no JAX."""

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from clustering.errors import UserError
from xelm.models.config import ModelConfig
from xelm.models.families.bert import BERT, XLM_ROBERTA
from xelm.models.families.bloom import BLOOM
from xelm.models.families.family import Family
from xelm.models.families.gemma import GEMMA2, GEMMA3
from xelm.models.families.gpt2 import GPT2
from xelm.models.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from xelm.models.families.modernbert import MODERNBERT
from xelm.models.families.xglm import XGLM

FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "xglm": XGLM,
    "bloom": BLOOM,
    "gpt2": GPT2,
    "bert": BERT,
    "xlm-roberta": XLM_ROBERTA,
    "modernbert": MODERNBERT,
}


def family(model_type: Any) -> Family:
    """The family of a checkpoint; an unknown one is the user's mistake."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"model_type {model_type!r} is not known; known: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def model_config(source: Mapping[str, Any]) -> ModelConfig:
    """The shape that a config.json declares. transformers reads it, so that defaults, nulls and the
    names of older files mean here what they mean there."""
    from transformers import CONFIG_MAPPING

    kind = family(source.get("model_type"))
    try:
        hub = CONFIG_MAPPING[source["model_type"]].from_dict(copy.deepcopy(dict(source)))
        return kind.read(hub)
    except UserError:
        raise
    except Exception as error:  # of transformers' checks, which know no common type
        raise UserError(" ".join(str(error.__cause__ or error).split())) from error


def writable_as(config: ModelConfig) -> str:
    """The first model_type whose config.json, made afresh, says all of a shape."""
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
    """config.json of a model that is made here; settings that would not come back from a checkpoint
    of this family are refused."""
    kind = family(model_type)
    if kind.write is None:
        written_ones = ", ".join(name for name, known in FAMILIES.items() if known.write)
        raise UserError(f"fresh models are made as {written_ones}; got {model_type}")
    written = kind.write(config)
    try:
        back = model_config(written)
    except UserError as error:
        raise UserError(f"model_type {model_type}: {error}") from None
    misfits = [
        f"model.{name}={value} (wanted {wanted})"
        for name, value in asdict(config).items()
        if value != (wanted := asdict(back)[name])
    ]
    if misfits:
        raise UserError(f"model_type {model_type} does not go with {', '.join(misfits)}")
    return written
