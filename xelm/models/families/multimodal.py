"""Models that read images too, of which the text model is read alone. Imports no JAX."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from clustering.files import read_object
from clustering.hub_files import INDEX, WEIGHTS
from xelm.models.families.family import Family, want

WITH_IMAGES = ("gemma3", "mistral3")
"""`model_type` of models that have a `text_config`, of a family of its own, and read images."""

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_KEPT = ("dtype", "torch_dtype", "quantization_config", "auto_map")
"""Settings of the whole model that its text model has too."""


def text_config(hub: Any, directory: Path, source: Mapping[str, Any]) -> Any:
    """The configuration of the text model of a model that reads images. source: contents of its
    config.json. Where these do not say whether embedding and output head are tied, they are unless
    a head is stored, as transformers decides while loading."""
    text = hub.text_config
    # The whole model has no cap of logits, whatever is said there.
    want("final_logit_softcapping", getattr(text, "final_logit_softcapping", None), [None])
    tied = source.get("tie_word_embeddings")
    text.tie_word_embeddings = not _stores_head(directory) if tied is None else tied
    for name in _SPECIAL_IDS:
        if (found := getattr(hub, name, None)) is not None:
            setattr(text, name, found)
    return text


def _stores_head(directory: Path) -> bool:
    """Whether a checkpoint directory has an output head of its own; False without weights."""
    if (directory / WEIGHTS).is_file():
        with safe_open(directory / WEIGHTS, framework="np") as file:
            names = list(file.keys())
    elif (directory / INDEX).is_file():
        names = list(read_object(directory / INDEX).get("weight_map") or {})
    else:
        return False
    return any(name.endswith("lm_head.weight") for name in names)


def text_source(source: Mapping[str, Any], text: Any) -> dict[str, Any]:
    """Contents of the config.json of a text model alone. source: those of the whole model; text:
    `text_config` of that."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    usual = PreTrainedConfig().to_dict()
    found = {k: v for k, v in text.to_dict().items() if k not in usual or usual[k] != v}
    return found | {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]],
        "model_type": text.model_type,
        "tie_word_embeddings": text.tie_word_embeddings,
        **{name: source[name] for name in _KEPT if name in source},
    }


def beside_images(kind: Family) -> Family:
    """A family as its tensors are named in checkpoints of models that read images."""
    return replace(
        kind,
        starts={
            "model.language_model.": "model.",
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
            "lm_head.": "lm_head.",
        },
        ignored=(*kind.ignored, "vision_tower.", "multi_modal_projector."),
    )
