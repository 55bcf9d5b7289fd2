"""Granite, dense ones: Llama with factors of embeddings, scores, results and logits."""

from typing import Any

from xelm.models.config import ModelConfig
from xelm.models.families.family import Family
from xelm.models.families.llama import TENSORS, llama_like


def _read(hub: Any) -> ModelConfig:
    return llama_like(
        hub,
        query_bias=hub.attention_bias,
        output_bias=hub.attention_bias,
        feedforward_bias=hub.mlp_bias,
        embedding_scale=float(hub.embedding_multiplier),
        attention_scale=float(hub.attention_multiplier),
        residual_scale=float(hub.residual_multiplier),
        logit_scale=1 / hub.logits_scaling,
    )


# Granite Team 2024, "Granite 3.0 Language Models".
GRANITE = Family(read=_read, tensors=TENSORS, prefix="model.", ignored=("rotary_emb.inv_freq",))
