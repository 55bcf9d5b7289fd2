"""EuroBERT: Llama whose tokens see all others, with a masked-language-model head."""

from typing import Any

from xelm.models.config import ModelConfig
from xelm.models.families.family import Family, table
from xelm.models.families.llama import TENSORS, llama_like


def _read(hub: Any) -> ModelConfig:
    biased = hub.attention_bias
    return llama_like(
        hub,
        causal=False,
        query_bias=biased,
        output_bias=biased,
        feedforward_bias=hub.mlp_bias,
        head_bias=hub.mlp_bias,
    )


# Boizard et al. 2025, arXiv 2503.05500.
EUROBERT = Family(
    read=_read,
    tensors={**TENSORS, **table("lm_head.bias", "head_bias")},
    prefix="model.",
    with_head="EuroBERT/EuroBERT-210m",
)
