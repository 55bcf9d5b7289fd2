"""GPT-NeoX, and Pythia and Polyglot, which are built like it."""

from typing import Any

from xelm.models.config import ModelConfig
from xelm.models.families.family import (
    BIASED,
    QKV,
    Family,
    activation,
    linear,
    norm,
    rope,
    shape,
    table,
    want,
)


def _read(hub: Any) -> ModelConfig:
    biased, size = hub.attention_bias, hub.hidden_size // hub.num_attention_heads
    # Of transformers' model, rotary positions alone heed it.
    want("head_dim", getattr(hub, "head_dim", None), [None, size])
    return ModelConfig(
        **shape(hub),
        **{**BIASED, "query_bias": biased, "output_bias": biased},
        feedforward_width=hub.intermediate_size,
        max_length=hub.max_position_embeddings,
        norm_epsilon=hub.layer_norm_eps,
        parallel="two norms" if hub.use_parallel_residual else "no",
        activation=activation("hidden_act", hub.hidden_act),
        rope=rope(hub.rope_parameters, partial=True),
    )


# Black et al. 2022, arXiv 2204.06745; Biderman et al. 2023, arXiv 2304.01373 (Pythia).
GPT_NEOX = Family(
    read=_read,
    tensors={
        **table("gpt_neox.embed_in.weight", "embedding"),
        **table("embed_out.weight", "head"),
        **norm("gpt_neox.final_layer_norm", "norm"),
        **norm("gpt_neox.layers.{}.input_layernorm", "blocks/attention_norm"),
        **linear("gpt_neox.layers.{}.attention.query_key_value", *QKV, by_head=True),
        **linear("gpt_neox.layers.{}.attention.dense", "blocks/output"),
        **norm("gpt_neox.layers.{}.post_attention_layernorm", "blocks/feedforward_norm"),
        **linear("gpt_neox.layers.{}.mlp.dense_h_to_4h", "blocks/up"),
        **linear("gpt_neox.layers.{}.mlp.dense_4h_to_h", "blocks/down"),
    },
    prefix="gpt_neox.",
    # Buffers that old checkpoints carry.
    ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    renamed={"lm_head.weight": "embed_out.weight"},
)
