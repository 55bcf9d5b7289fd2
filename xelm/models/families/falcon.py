"""Falcon and Falcon 2, with rotary positions."""

from dataclasses import replace
from typing import Any

from xelm.models.config import ModelConfig
from xelm.models.families.family import (
    QKV,
    Family,
    activation,
    linear,
    norm,
    require,
    rope,
    shape,
    table,
    want,
)


def _read(hub: Any) -> ModelConfig:
    # Of linear biases transformers' ways to compute attention make different results.
    require(hub, alibi=False)
    if hub.new_decoder_architecture:
        require(hub, parallel_attn=True)
        keys = hub.num_kv_heads
    else:
        keys = 1 if hub.multi_query else hub.num_attention_heads
    parallel = hub.new_decoder_architecture or hub.parallel_attn
    two = _has_two_norms(hub)
    if parallel and not two:
        want("num_ln_in_parallel_attn", hub.num_ln_in_parallel_attn, [None, 1])
    return ModelConfig(
        **shape(hub) | {"key_head_count": keys},
        feedforward_width=hub.ffn_hidden_size,
        max_length=hub.max_position_embeddings,
        norm="layer",
        norm_bias=True,
        norm_epsilon=hub.layer_norm_epsilon,
        parallel="no" if not parallel else "two norms" if two else "one norm",
        gated=False,
        activation=activation("activation", hub.activation),
        **dict.fromkeys(("query_bias", "output_bias", "feedforward_bias"), bool(hub.bias)),
        rope=rope(hub.rope_parameters),
    )


def _has_two_norms(hub: Any) -> bool:
    """Whether attention and feed-forward have norms of their own, though they are parallel."""
    return bool(hub.new_decoder_architecture) and hub.num_ln_in_parallel_attn in (None, 2)


_LAYER = "transformer.h.{}"
_TENSORS = {
    **table("transformer.word_embeddings.weight", "embedding"),
    **table("lm_head.weight", "head"),
    **norm("transformer.ln_f", "norm"),
    **linear(f"{_LAYER}.self_attention.query_key_value", *QKV, by_head=True),
    **linear(f"{_LAYER}.self_attention.dense", "blocks/output"),
    **linear(f"{_LAYER}.mlp.dense_h_to_4h", "blocks/up"),
    **linear(f"{_LAYER}.mlp.dense_4h_to_h", "blocks/down"),
}
# Almazrouei et al. 2023, arXiv 2311.16867; Malartic et al. 2024, arXiv 2407.14885 (Falcon 2).
_FALCON = Family(
    read=_read,
    tensors={
        **_TENSORS,
        **norm(f"{_LAYER}.input_layernorm", "blocks/attention_norm"),
        **norm(f"{_LAYER}.post_attention_layernorm", "blocks/feedforward_norm"),
    },
    prefix="transformer.",
)
# Falcon 40B and 180B.
_TWO_NORMS = replace(
    _FALCON,
    tensors={
        **_TENSORS,
        **norm(f"{_LAYER}.ln_attn", "blocks/attention_norm"),
        **norm(f"{_LAYER}.ln_mlp", "blocks/feedforward_norm"),
    },
)
FALCON = replace(_FALCON, variant=lambda hub: _TWO_NORMS if _has_two_norms(hub) else _FALCON)
