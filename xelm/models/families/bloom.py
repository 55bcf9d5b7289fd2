"""BLOOM."""

from typing import Any

from xelm.models.config import ModelConfig
from xelm.models.families.family import Family, linear, norm, table, want


def _read(hub: Any) -> ModelConfig:
    name = "apply_residual_connection_post_layernorm"
    want(name, getattr(hub, name), [False])
    return ModelConfig(
        vocabulary_size=hub.vocab_size,
        width=hub.hidden_size,
        feedforward_width=4 * hub.hidden_size,
        layer_count=hub.num_hidden_layers,
        head_count=hub.num_attention_heads,
        key_head_count=hub.num_attention_heads,
        head_size=hub.hidden_size // hub.num_attention_heads,
        # Linear biases know no longest sequence; it was trained on 2048.
        max_length=getattr(hub, "seq_length", 2048),
        norm="layer",
        norm_bias=True,
        norm_epsilon=hub.layer_norm_epsilon,
        embedding_norm=True,
        activation="gelu_tanh",
        gated=False,
        query_bias=True,
        output_bias=True,
        feedforward_bias=True,
        positions="alibi",
        tie_embeddings=hub.tie_word_embeddings,
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
        **linear(
            "transformer.h.{}.self_attention.query_key_value",
            "blocks/query",
            "blocks/key",
            "blocks/value",
            by_head=True,
        ),
        **linear("transformer.h.{}.self_attention.dense", "blocks/output"),
        **norm("transformer.h.{}.post_attention_layernorm", "blocks/feedforward_norm"),
        **linear("transformer.h.{}.mlp.dense_h_to_4h", "blocks/up"),
        **linear("transformer.h.{}.mlp.dense_4h_to_h", "blocks/down"),
    },
    prefix="transformer.",
)
