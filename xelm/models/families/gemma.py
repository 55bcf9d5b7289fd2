"""Gemma 2 and the text models of Gemma 3."""

from typing import Any

from xelm.models.config import ModelConfig
from xelm.models.families.family import Family, activation, local, norm, rope, rope_of, want
from xelm.models.families.llama import TENSORS, llama_like


def _read_gemma2(hub: Any) -> ModelConfig:
    return _read(hub, attention_cap=hub.attn_logit_softcapping, rope=rope(hub.rope_parameters))


def _read_gemma3(hub: Any) -> ModelConfig:
    return _read(
        hub,
        head_norm=True,
        rope=rope_of(hub, "full_attention"),
        local_rope=rope_of(hub, "sliding_attention"),
    )


def _read(hub: Any, **settings: Any) -> ModelConfig:
    both_ways = getattr(hub, "use_bidirectional_attention", None)
    want("use_bidirectional_attention", both_ways, [None, False])
    return llama_like(
        hub,
        activation=activation("hidden_activation", hub.hidden_activation),
        norm_offset=1.0,
        norm_placement="around",
        query_bias=hub.attention_bias,
        output_bias=hub.attention_bias,
        embedding_scale=hub.hidden_size**0.5,
        attention_scale=hub.query_pre_attn_scalar**-0.5,
        logit_cap=hub.final_logit_softcapping,
        **local(hub.sliding_window, hub.layer_types),
        **settings,
    )


_TENSORS = {
    **TENSORS,
    **norm("model.layers.{}.post_attention_layernorm", "blocks/attention_result_norm"),
    **norm("model.layers.{}.pre_feedforward_layernorm", "blocks/feedforward_norm"),
    **norm("model.layers.{}.post_feedforward_layernorm", "blocks/feedforward_result_norm"),
}
_COMMON: dict[str, Any] = {"tensors": _TENSORS, "prefix": "model."}
# Gemma Team 2024, arXiv 2408.00118.
GEMMA2 = Family(read=_read_gemma2, **_COMMON)
# Gemma Team 2025, arXiv 2503.19786.
GEMMA3 = Family(read=_read_gemma3, **_COMMON)
