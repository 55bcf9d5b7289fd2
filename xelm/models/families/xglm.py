"""XGLM, the seed of the paper."""

from typing import Any

from xelm.models.config import ModelConfig
from xelm.models.families.family import (
    BIASED,
    Family,
    activation,
    linear,
    norm,
    require,
    shape,
    table,
    want,
)


def _read(hub: Any) -> ModelConfig:
    require(hub, add_cross_attention=False)
    # Another id would be the number of a position, which then is a zero vector.
    want("pad_token_id", hub.pad_token_id, [None, 0, 1])
    return ModelConfig(
        **shape(hub),
        **BIASED,
        feedforward_width=hub.ffn_dim,
        max_length=hub.max_position_embeddings,
        norm_epsilon=1e-5,
        activation=activation("activation_function", hub.activation_function),
        positions="sinusoidal",
        position_offset=2,
        embedding_scale=hub.hidden_size**0.5 if hub.scale_embedding else 1.0,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["XGLMForCausalLM"],
        "model_type": "xglm",
        "vocab_size": config.vocabulary_size,
        "d_model": config.width,
        "ffn_dim": config.feedforward_width,
        "num_layers": config.layer_count,
        "attention_heads": config.head_count,
        "max_position_embeddings": config.max_length,
        "activation_function": config.activation,
        "scale_embedding": config.embedding_scale != 1.0,
        "tie_word_embeddings": config.tie_embeddings,
    }


# Lin et al. 2022, arXiv 2112.10668.
XGLM = Family(
    read=_read,
    write=_write,
    tensors={
        **table("model.embed_tokens.weight", "embedding"),
        **table("lm_head.weight", "head"),
        **norm("model.layer_norm", "norm"),
        **norm("model.layers.{}.self_attn_layer_norm", "blocks/attention_norm"),
        **linear("model.layers.{}.self_attn.q_proj", "blocks/query"),
        **linear("model.layers.{}.self_attn.k_proj", "blocks/key"),
        **linear("model.layers.{}.self_attn.v_proj", "blocks/value"),
        **linear("model.layers.{}.self_attn.out_proj", "blocks/output"),
        **norm("model.layers.{}.final_layer_norm", "blocks/feedforward_norm"),
        **linear("model.layers.{}.fc1", "blocks/up"),
        **linear("model.layers.{}.fc2", "blocks/down"),
    },
    prefix="model.",
    ignored=("embed_positions.weights",),
)
