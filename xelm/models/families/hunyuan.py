"""Hunyuan, dense ones (0.5B to 7B, and Hunyuan-MT)."""

from typing import Any

from clustering.errors import UserError
from xelm.models.config import ModelConfig, Rope
from xelm.models.families.family import Family, norm, rope, without
from xelm.models.families.llama import TENSORS, llama_like


def _read(hub: Any) -> ModelConfig:
    if hub.head_dim is None:  # transformers ends in a TypeError
        raise UserError("head_dim must be a number for this model; config.json has None")
    return llama_like(
        hub,
        rope=_rope(hub),
        query_bias=hub.attention_bias,
        output_bias=hub.attention_bias,
        head_norm=True,
        head_norm_after_positions=True,
    )


def _rope(hub: Any) -> Rope:
    """Rotary positions; a fixed alpha stretches the base, whatever the length of the sequence."""
    found, size = hub.rope_parameters, hub.head_dim
    if found["rope_type"] != "dynamic" or not found.get("alpha"):
        return rope(found)
    return Rope(theta=float(found["rope_theta"] * found["alpha"] ** (size / (size - 2))))


_TENSORS = {
    **without(TENSORS, "q_norm", "k_norm"),
    **norm("model.layers.{}.self_attn.query_layernorm", "blocks/query_norm"),
    **norm("model.layers.{}.self_attn.key_layernorm", "blocks/key_norm"),
}
# Tencent 2025, arXiv 2509.05209 (Hunyuan-MT).
HUNYUAN = Family(read=_read, tensors=_TENSORS, prefix="model.", ignored=("rotary_emb.inv_freq",))
