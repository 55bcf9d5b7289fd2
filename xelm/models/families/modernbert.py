"""ModernBERT, and mmBERT, which is built like it."""

from typing import Any

from xelm.models.config import ModelConfig
from xelm.models.families.family import (
    QKV,
    Family,
    activation,
    linear,
    local,
    norm,
    rope_of,
    shape,
    table,
    want,
)


def _read(hub: Any) -> ModelConfig:
    # One field of ours for the two.
    want("classifier_activation", hub.classifier_activation, [hub.hidden_activation])
    return ModelConfig(
        **shape(hub),
        feedforward_width=hub.intermediate_size,
        max_length=hub.max_position_embeddings,
        causal=False,
        norm="layer",
        norm_bias=hub.norm_bias,
        norm_epsilon=hub.norm_eps,
        first_norm=False,
        embedding_norm=True,
        activation=activation("hidden_activation", hub.hidden_activation),
        query_bias=hub.attention_bias,
        output_bias=hub.attention_bias,
        feedforward_bias=hub.mlp_bias,
        # Half of local_attention to either side.
        **local(hub.local_attention // 2 + 1, hub.layer_types),
        rope=rope_of(hub, "full_attention"),
        local_rope=rope_of(hub, "sliding_attention"),
        head_transform=True,
        head_transform_bias=hub.classifier_bias,
        head_bias=hub.decoder_bias,
    )


# Warner et al. 2024, arXiv 2412.13663; Marone et al. 2025, arXiv 2509.06888 (mmBERT).
MODERNBERT = Family(
    read=_read,
    tensors={
        **table("model.embeddings.tok_embeddings.weight", "embedding"),
        **norm("model.embeddings.norm", "embedding_norm"),
        **norm("model.final_norm", "norm"),
        **norm("model.layers.{}.attn_norm", "blocks/attention_norm"),
        **linear("model.layers.{}.attn.Wqkv", *QKV),
        **linear("model.layers.{}.attn.Wo", "blocks/output"),
        **norm("model.layers.{}.mlp_norm", "blocks/feedforward_norm"),
        # What passes the activation comes first.
        **linear("model.layers.{}.mlp.Wi", "blocks/gate", "blocks/up"),
        **linear("model.layers.{}.mlp.Wo", "blocks/down"),
        **linear("head.dense", "transform/dense"),
        **norm("head.norm", "transform/norm"),
        **table("decoder.weight", "head"),
        **table("decoder.bias", "head_bias"),
    },
    prefix="model.",
    with_head="jhu-clsp/mmBERT-base",
)
