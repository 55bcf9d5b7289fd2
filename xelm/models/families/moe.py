"""Qwen 3 and OLMoE with several feed-forwards in each layer, all layers alike."""

from typing import Any

from xelm.models.config import ModelConfig
from xelm.models.families.family import Family, all_local, linear, require, want, without
from xelm.models.families.llama import MOST_EXPERTS, TENSORS, llama_like


def _read_qwen3(hub: Any) -> ModelConfig:
    # Other values put a single feed-forward into some of the layers.
    require(hub, decoder_sparse_step=1)
    want("mlp_only_layers", hub.mlp_only_layers, [[], None])
    return _read(hub, feedforward_width=hub.moe_intermediate_size, **all_local(hub))


def _read_olmoe(hub: Any) -> ModelConfig:
    require(hub, clip_qkv=None)
    return _read(hub, head_norm_form="joint")


def _read(hub: Any, **settings: Any) -> ModelConfig:
    return llama_like(
        hub,
        query_bias=hub.attention_bias,
        output_bias=hub.attention_bias,
        head_norm=True,
        expert_count=hub.num_experts,
        experts_per_token=hub.num_experts_per_tok,
        expert_weights_sum_to_one=hub.norm_topk_prob,
        **settings,
    )


_LAYER = "model.layers.{}.mlp"
_TENSORS = {
    **without(TENSORS, ".mlp."),
    **linear(f"{_LAYER}.gate", "blocks/router", bias=False),
    **{
        name: tensor
        for number in range(MOST_EXPERTS)
        for own in ("gate", "up", "down")
        for name, tensor in linear(
            f"{_LAYER}.experts.{number}.{own}_proj", f"blocks/expert_{number}/{own}", bias=False
        ).items()
    },
}
# Qwen Team 2025, arXiv 2505.09388.
QWEN3_MOE = Family(read=_read_qwen3, tensors=_TENSORS, prefix="model.")
# Muennighoff et al. 2024, arXiv 2409.02060.
OLMOE = Family(read=_read_olmoe, tensors=_TENSORS, prefix="model.")
