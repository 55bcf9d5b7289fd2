"""Models that read images too, of which the text model is read alone. Imports no JAX."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xelm.models.families.family import Family, want

WITH_IMAGES = ("gemma3", "mistral3")
"""`model_type` of models that have a `text_config`, of a family of its own, and read images."""

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_KEPT = ("dtype", "torch_dtype", "quantization_config", "auto_map")
"""Settings of the whole model that its text model has too."""


def text_config(hub: Any) -> Any:
    """The configuration of the text model of a model that reads images."""
    text = hub.text_config
    # The whole model has no cap of logits, whatever is said there.
    want("final_logit_softcapping", getattr(text, "final_logit_softcapping", None), [None])
    text.tie_word_embeddings = hub.tie_word_embeddings
    for name in _SPECIAL_IDS:
        if (found := getattr(hub, name, None)) is not None:
            setattr(text, name, found)
    return text


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
