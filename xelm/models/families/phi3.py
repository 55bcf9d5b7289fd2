"""Phi-3, Phi-3.5 and Phi-4, whose text models are built like Llama with fused projections."""

import math
from typing import Any

from xelm.models.config import ModelConfig, Rope
from xelm.models.families.family import QKV, Family, all_local, linear, norm, rope, table
from xelm.models.families.llama import llama_like


def _read(hub: Any) -> ModelConfig:
    length = hub.max_position_embeddings
    if hub.rope_parameters["rope_type"] == "longrope":
        found = _longrope(hub)
        # Longer sequences have other frequencies from their first token on, so that what a cache
        # has of them would be of no use: nothing longer is read.
        length = min(length, hub.original_max_position_embeddings)
    else:
        found = rope(hub.rope_parameters, partial=True)
    return llama_like(hub, max_length=length, rope=found, **all_local(hub))


def _longrope(hub: Any) -> Rope:
    found, original = hub.rope_parameters, hub.original_max_position_embeddings
    factor = found.get("factor") or hub.max_position_embeddings / original
    amplitude = found.get("attention_factor")
    if amplitude is None:
        amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(
        theta=float(found["rope_theta"]),
        partial_rotary_factor=found["partial_rotary_factor"],
        scaling="longrope",
        original_length=original,
        short_factors=tuple(map(float, found["short_factor"])),
        amplitude=float(amplitude),
    )


# Microsoft 2024, arXiv 2404.14219.
PHI3 = Family(
    read=_read,
    tensors={
        **table("model.embed_tokens.weight", "embedding"),
        **table("lm_head.weight", "head"),
        **norm("model.norm", "norm"),
        **norm("model.layers.{}.input_layernorm", "blocks/attention_norm"),
        **linear("model.layers.{}.self_attn.qkv_proj", *QKV),
        **linear("model.layers.{}.self_attn.o_proj", "blocks/output"),
        **norm("model.layers.{}.post_attention_layernorm", "blocks/feedforward_norm"),
        **linear("model.layers.{}.mlp.gate_up_proj", "blocks/gate", "blocks/up"),
        **linear("model.layers.{}.mlp.down_proj", "blocks/down"),
    },
    prefix="model.",
)
