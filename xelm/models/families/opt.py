"""OPT."""

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
    require(hub, layer_norm_elementwise_affine=True)
    # OPT 350M has narrower embeddings, and matrices to and from them.
    want("word_embed_proj_dim", hub.word_embed_proj_dim, [hub.hidden_size])
    before, biased = hub.do_layer_norm_before, hub.enable_bias
    return ModelConfig(
        **shape(hub),
        **{**BIASED, **dict.fromkeys(("query_bias", "output_bias", "feedforward_bias"), biased)},
        feedforward_width=hub.ffn_dim,
        max_length=hub.max_position_embeddings,
        norm_epsilon=1e-5,
        norm_placement="before" if before else "after",
        final_norm=before and not hub._remove_final_layer_norm,
        activation=activation("activation_function", hub.activation_function),
        positions="learned",
        position_offset=2,
        positions_skip_padding=True,
    )


# Zhang et al. 2022, arXiv 2205.01068.
OPT = Family(
    read=_read,
    tensors={
        **table("model.decoder.embed_tokens.weight", "embedding"),
        **table("model.decoder.embed_positions.weight", "positions"),
        **table("lm_head.weight", "head"),
        **norm("model.decoder.final_layer_norm", "norm"),
        **norm("model.decoder.layers.{}.self_attn_layer_norm", "blocks/attention_norm"),
        **linear("model.decoder.layers.{}.self_attn.q_proj", "blocks/query"),
        **linear("model.decoder.layers.{}.self_attn.k_proj", "blocks/key"),
        **linear("model.decoder.layers.{}.self_attn.v_proj", "blocks/value"),
        **linear("model.decoder.layers.{}.self_attn.out_proj", "blocks/output"),
        **norm("model.decoder.layers.{}.final_layer_norm", "blocks/feedforward_norm"),
        **linear("model.decoder.layers.{}.fc1", "blocks/up"),
        **linear("model.decoder.layers.{}.fc2", "blocks/down"),
    },
    prefix="model.",
)
