"""Command R and R7B of Cohere, and the models of Aya, which are built like them."""

from typing import Any

from clustering.errors import UserError
from xelm.models.config import ModelConfig
from xelm.models.families.family import Family, local, rope
from xelm.models.families.llama import TENSORS, llama_like


def _read_cohere(hub: Any) -> ModelConfig:
    normed = {"head_norm": True, "head_norm_form": "each"} if hub.use_qk_norm else {}
    return _read(hub, **normed)


def _read_cohere2(hub: Any) -> ModelConfig:
    # Only local layers have positions.
    nope = tuple(n for n, kind in enumerate(hub.layer_types) if kind == "full_attention")
    return _read(hub, nope_layers=nope, **local(hub.sliding_window, hub.layer_types))


def _read(hub: Any, **settings: Any) -> ModelConfig:
    if not hub.logit_scale:
        raise UserError(f"logit_scale must be a number; config.json has {hub.logit_scale}")
    return llama_like(
        hub,
        norm="layer",
        norm_epsilon=hub.layer_norm_eps,
        parallel="one norm",
        query_bias=hub.attention_bias,
        output_bias=hub.attention_bias,
        rope=rope(hub.rope_parameters, interleaved=True),
        logit_scale=hub.logit_scale,
        **settings,
    )


# Aryabumi et al. 2024, arXiv 2405.15032 (Aya 23); Dang et al. 2024, arXiv 2412.04261 (Aya Expanse).
COHERE = Family(read=_read_cohere, tensors=TENSORS, prefix="model.")
# Team Cohere 2025, arXiv 2504.00698 (Command R7B).
COHERE2 = Family(read=_read_cohere2, tensors=TENSORS, prefix="model.")
