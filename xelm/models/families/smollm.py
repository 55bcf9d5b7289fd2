"""SmolLM 3. Earlier ones are Llamas."""

from typing import Any

from clustering.errors import UserError
from xelm.models.config import ModelConfig
from xelm.models.families.family import Family, local, require
from xelm.models.families.llama import TENSORS, llama_like


def _read(hub: Any) -> ModelConfig:
    flags = hub.no_rope_layers  # 1: with rotary positions, in spite of the name
    if len(flags) < hub.num_hidden_layers:
        raise UserError(
            f"no_rope_layers must have {hub.num_hidden_layers} entries, one a layer; config.json "
            f"has {len(flags)}"
        )
    if "sliding_attention" in hub.layer_types:
        require(hub, use_sliding_window=True)  # without it, only some kernels heed layer_types
    return llama_like(
        hub,
        query_bias=hub.attention_bias,
        output_bias=hub.attention_bias,
        feedforward_bias=hub.mlp_bias,
        nope_layers=tuple(n for n in range(hub.num_hidden_layers) if not flags[n]),
        **local(hub.sliding_window, hub.layer_types),
    )


# Bakouch et al. 2025, "SmolLM3: smol, multilingual, long-context reasoner".
SMOLLM3 = Family(read=_read, tensors=TENSORS, prefix="model.")
