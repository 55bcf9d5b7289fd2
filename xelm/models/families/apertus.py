"""Apertus."""

from typing import Any

from xelm.models.config import ModelConfig
from xelm.models.families.family import Family, require, table
from xelm.models.families.llama import TENSORS, llama_like


def _read(hub: Any) -> ModelConfig:
    require(hub, hidden_act="xielu")
    return llama_like(
        hub,
        activation="xielu",
        gated=False,
        head_norm=True,
        query_bias=hub.attention_bias,
        output_bias=hub.attention_bias,
    )


_ACTIVATION = "model.layers.{}.mlp.act_fn"


def _own_name(name: str) -> str:
    """Name of a tensor that Llama has under another one."""
    name = name.replace("post_attention_layernorm", "feedforward_layernorm")
    return name.replace("input_layernorm", "attention_layernorm")


# Swiss AI 2025, arXiv 2509.14233.
APERTUS = Family(
    read=_read,
    tensors={
        **{_own_name(name): tensor for name, tensor in TENSORS.items()},
        **table(f"{_ACTIVATION}.alpha_p", "blocks/xielu/alpha_p"),
        **table(f"{_ACTIVATION}.alpha_n", "blocks/xielu/alpha_n"),
    },
    constants={f"{_ACTIVATION}.beta": 0.5, f"{_ACTIVATION}.eps": -1e-6},
    prefix="model.",
)
