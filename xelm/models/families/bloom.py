"""BLOOM."""

from typing import Any

from xelm.models.config import ModelConfig
from xelm.models.families.family import BIASED, QKV, Family, linear, norm, require, shape, table


def _read(hub: Any) -> ModelConfig:
    require(hub, apply_residual_connection_post_layernorm=False)
    return ModelConfig(
        **shape(hub),
        **BIASED,
        feedforward_width=4 * hub.hidden_size,
        # Linear biases know no longest sequence; it was trained on 2048.
        max_length=getattr(hub, "seq_length", 2048),
        norm_epsilon=hub.layer_norm_epsilon,
        embedding_norm=True,
        activation="gelu_tanh",
        positions="alibi",
    )


# BigScience 2022, arXiv 2211.05100.
BLOOM = Family(
    read=_read,
    tensors={
        **table("transformer.word_embeddings.weight", "embedding"),
        **norm("transformer.word_embeddings_layernorm", "embedding_norm"),
        **table("lm_head.weight", "head"),
        **norm("transformer.ln_f", "norm"),
        **norm("transformer.h.{}.input_layernorm", "blocks/attention_norm"),
        **linear("transformer.h.{}.self_attention.query_key_value", *QKV, by_head=True),
        **linear("transformer.h.{}.self_attention.dense", "blocks/output"),
        **norm("transformer.h.{}.post_attention_layernorm", "blocks/feedforward_norm"),
        **linear("transformer.h.{}.mlp.dense_h_to_4h", "blocks/up"),
        **linear("transformer.h.{}.mlp.dense_4h_to_h", "blocks/down"),
    },
    prefix="transformer.",
)
