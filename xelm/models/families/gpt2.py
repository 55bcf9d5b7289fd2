"""GPT-2, and mGPT, which is built like it."""

from typing import Any

from xelm.models.config import ModelConfig
from xelm.models.families.family import (
    BIASED,
    QKV,
    Family,
    activation,
    linear,
    norm,
    require,
    shape,
    table,
)


def _read(hub: Any) -> ModelConfig:
    require(hub, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    require(hub, add_cross_attention=False)
    return ModelConfig(
        **shape(hub),
        **BIASED,
        feedforward_width=hub.n_inner or 4 * hub.hidden_size,
        max_length=hub.max_position_embeddings,
        norm_epsilon=hub.layer_norm_epsilon,
        activation=activation("activation_function", hub.activation_function),
        positions="learned",
    )


# Radford et al. 2019; Shliazhko et al. 2022, arXiv 2204.07580 (mGPT).
GPT2 = Family(
    read=_read,
    tensors={
        **table("transformer.wte.weight", "embedding"),
        **table("transformer.wpe.weight", "positions"),
        **table("lm_head.weight", "head"),
        **norm("transformer.ln_f", "norm"),
        **norm("transformer.h.{}.ln_1", "blocks/attention_norm"),
        **linear("transformer.h.{}.attn.c_attn", *QKV, inputs_first=True),
        **linear("transformer.h.{}.attn.c_proj", "blocks/output", inputs_first=True),
        **norm("transformer.h.{}.ln_2", "blocks/feedforward_norm"),
        **linear("transformer.h.{}.mlp.c_fc", "blocks/up", inputs_first=True),
        **linear("transformer.h.{}.mlp.c_proj", "blocks/down", inputs_first=True),
    },
    prefix="transformer.",
    # Masks that old checkpoints carry as buffers.
    ignored=(".attn.bias", ".attn.masked_bias"),
)
