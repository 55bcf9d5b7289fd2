"""Llama and what is built like it: Mistral, Ministral, Qwen 2 and 3."""

from dataclasses import replace
from typing import Any

from clustering.errors import UserError
from xelm.models.config import ModelConfig, Rope
from xelm.models.families.family import (
    Family,
    activation,
    all_local,
    linear,
    local,
    norm,
    require,
    rope,
    shape,
    table,
)


def llama_like(hub: Any, **settings: Any) -> ModelConfig:
    """The shape of Llama with the settings of another family on top."""
    found = shape(hub) | {
        "feedforward_width": hub.intermediate_size,
        "key_head_count": hub.num_key_value_heads,
        "max_length": hub.max_position_embeddings,
    }
    if "norm_epsilon" not in settings:
        found["norm_epsilon"] = hub.rms_norm_eps
    if getattr(hub, "head_dim", None):
        found["head_size"] = hub.head_dim
    if "activation" not in settings:
        found["activation"] = activation("hidden_act", hub.hidden_act)
    if "rope" not in settings:
        found["rope"] = rope(hub.rope_parameters)
    return ModelConfig(**found | settings)


def _read_llama(hub: Any) -> ModelConfig:
    biased = hub.attention_bias
    return llama_like(hub, query_bias=biased, output_bias=biased, feedforward_bias=hub.mlp_bias)


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "intermediate_size": config.feedforward_width,
        "num_hidden_layers": config.layer_count,
        "num_attention_heads": config.head_count,
        "num_key_value_heads": config.key_head_count,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": config.query_bias,
        "mlp_bias": config.feedforward_bias,
        "rope_parameters": _write_rope(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
    }


def _write_rope(rope: Rope) -> dict[str, Any]:
    if rope.scaling == "none":
        return {"rope_type": "default", "rope_theta": rope.theta}
    written = {"rope_type": rope.scaling, "rope_theta": rope.theta, "factor": rope.factor}
    if rope.scaling == "llama3":
        written |= {"low_freq_factor": rope.slowest, "high_freq_factor": rope.fastest}
    if rope.scaling == "yarn":
        written |= {"beta_slow": rope.slowest, "beta_fast": rope.fastest}
        written |= {"truncate": rope.truncate, "attention_factor": rope.amplitude}
    if rope.original_length:
        written["original_max_position_embeddings"] = rope.original_length
    return written


def _read_mistral(hub: Any) -> ModelConfig:
    # With layer_types, transformers makes a Ministral of it.
    return llama_like(hub, **all_local(hub))


def _read_mixtral(hub: Any) -> ModelConfig:
    require(hub, hidden_act="silu")
    experts = {
        "expert_count": hub.num_local_experts,
        "experts_per_token": hub.num_experts_per_tok,
    }
    return llama_like(hub, **all_local(hub), **experts)


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    written = _write_llama(config)
    for name in ("attention_bias", "mlp_bias"):
        del written[name]
    return written | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": config.expert_count,
        "num_experts_per_tok": config.experts_per_token,
        "sliding_window": config.local_window,
        "output_router_logits": False,
    }


def _read_ministral(hub: Any) -> ModelConfig:
    if hub.head_dim is None:  # transformers ends in a TypeError
        raise UserError("head_dim must be a number for this model; config.json has None")
    return llama_like(hub, **local(hub.sliding_window, hub.layer_types))


def _read_ministral3(hub: Any) -> ModelConfig:
    found, growth = hub.rope_parameters, hub.rope_parameters.get("llama_4_scaling_beta")
    original = found.get("original_max_position_embeddings")
    if growth is None or original is None:  # transformers ends in a TypeError
        raise UserError(
            "llama_4_scaling_beta and original_max_position_embeddings must be numbers for this "
            f"model; config.json has {growth} and {original}"
        )
    grown = replace(rope(found), query_growth=float(growth), original_length=original)
    return llama_like(hub, rope=grown, **all_local(hub))


def _read_qwen2(hub: Any) -> ModelConfig:
    return llama_like(hub, query_bias=True, **local(hub.sliding_window, hub.layer_types))


def _read_qwen3(hub: Any) -> ModelConfig:
    settings = local(hub.sliding_window, hub.layer_types) | {"head_norm": True}
    return llama_like(
        hub, query_bias=hub.attention_bias, output_bias=hub.attention_bias, **settings
    )


TENSORS = {
    **table("model.embed_tokens.weight", "embedding"),
    **table("lm_head.weight", "head"),
    **norm("model.norm", "norm"),
    **norm("model.layers.{}.input_layernorm", "blocks/attention_norm"),
    **linear("model.layers.{}.self_attn.q_proj", "blocks/query"),
    **linear("model.layers.{}.self_attn.k_proj", "blocks/key"),
    **linear("model.layers.{}.self_attn.v_proj", "blocks/value"),
    **norm("model.layers.{}.self_attn.q_norm", "blocks/query_norm"),
    **norm("model.layers.{}.self_attn.k_norm", "blocks/key_norm"),
    **linear("model.layers.{}.self_attn.o_proj", "blocks/output"),
    **norm("model.layers.{}.post_attention_layernorm", "blocks/feedforward_norm"),
    **linear("model.layers.{}.mlp.gate_proj", "blocks/gate"),
    **linear("model.layers.{}.mlp.up_proj", "blocks/up"),
    **linear("model.layers.{}.mlp.down_proj", "blocks/down"),
}
MOST_EXPERTS = 128
"""Largest number of experts of a layer that has a name in the table."""
_MOE = "model.layers.{}.block_sparse_moe"
_EXPERTS = {
    name: tensor
    for number in range(MOST_EXPERTS)
    for stored, own in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
    for name, tensor in linear(
        f"{_MOE}.experts.{number}.{stored}", f"blocks/expert_{number}/{own}", bias=False
    ).items()
}
_COMMON: dict[str, Any] = {
    "tensors": TENSORS,
    "prefix": "model.",
    "ignored": ("rotary_emb.inv_freq",),
}
# Jiang et al. 2024, arXiv 2401.04088: Mistral with several feed-forwards in each layer.
MIXTRAL = Family(
    read=_read_mixtral,
    write=_write_mixtral,
    tensors=TENSORS | linear(f"{_MOE}.gate", "blocks/router", bias=False) | _EXPERTS,
    prefix="model.",
)
# Touvron et al. 2023, arXiv 2302.13971; Llama Team 2024, arXiv 2407.21783.
LLAMA = Family(read=_read_llama, write=_write_llama, **_COMMON)
# Jiang et al. 2023, arXiv 2310.06825.
MISTRAL = Family(read=_read_mistral, **_COMMON)
# Mistral AI 2024, "Un Ministral, des Ministraux": Mistral with some layers global.
MINISTRAL = Family(read=_read_ministral, **_COMMON)
# Mistral AI 2026, arXiv 2601.08584: queries that grow with their position.
MINISTRAL3 = Family(read=_read_ministral3, **_COMMON)
# Qwen Team 2024, arXiv 2407.10671 and 2412.15115.
QWEN2 = Family(read=_read_qwen2, **_COMMON)
# Qwen Team 2025, arXiv 2505.09388.
QWEN3 = Family(read=_read_qwen3, **_COMMON)
