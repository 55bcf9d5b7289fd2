"""How the checkpoints of each model family on the Hub map to `ModelConfig` and to our parameters.

A family is a reader and a writer of its config.json and a table of tensor names. Imports no JAX.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from clustering.errors import UserError
from xelm.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One `model_type` of the Hub."""

    read: Callable[[Mapping[str, Any]], ModelConfig]
    """config.json -> ModelConfig; refuses what it would get wrong."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """ModelConfig -> config.json, for seeds that are made here."""
    keys: Mapping[str, str]
    """Tensor name -> our parameter path; `{}` stands for the layer number."""
    ignored: tuple[str, ...] = ()
    """Ends of tensor names that some checkpoints carry and that hold nothing learned."""

    def tensors(self, config: ModelConfig) -> dict[str, str]:
        """The tensor names a checkpoint of this shape has, with our parameter paths."""
        absent = set()
        if config.tie_embeddings:
            absent.add("head")
        if not config.gated:
            absent.add("blocks/gate")
        if not config.attention_bias:
            absent |= {f"blocks/{name}/bias" for name in ("query", "key", "value", "output")}
        if not config.feedforward_bias:
            absent |= {f"blocks/{name}/bias" for name in ("gate", "up", "down")}
        if config.norm == "rms":
            absent |= {"blocks/attention_norm/bias", "blocks/feedforward_norm/bias", "norm/bias"}
        return {
            name: path
            for name, path in self.keys.items()
            if path not in absent and path.rsplit("/", 1)[0] not in absent
        }


def _linear(name: str, path: str) -> dict[str, str]:
    return {f"{name}.weight": f"{path}/weight", f"{name}.bias": f"{path}/bias"}


def _norm(name: str, path: str) -> dict[str, str]:
    return {f"{name}.weight": f"{path}/scale", f"{name}.bias": f"{path}/bias"}


def _read_llama(source: Mapping[str, Any]) -> ModelConfig:
    # transformers 5 nests the rotary settings; older files have them at the top.
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    _want("rope_type", kind, ["default"])
    _want("hidden_act", source.get("hidden_act", "silu"), ["silu"])
    width, heads = _count(source, "hidden_size"), _count(source, "num_attention_heads")
    return ModelConfig(
        vocabulary_size=_count(source, "vocab_size"),
        width=width,
        feedforward_width=_count(source, "intermediate_size"),
        layer_count=_count(source, "num_hidden_layers"),
        head_count=heads,
        key_head_count=_count(source, "num_key_value_heads", heads),
        head_size=_count(source, "head_dim", width // heads),
        max_length=_count(source, "max_position_embeddings", 2048),
        norm_epsilon=float(source.get("rms_norm_eps", 1e-6)),
        attention_bias=_flag(source, "attention_bias", False),
        feedforward_bias=_flag(source, "mlp_bias", False),
        rope_theta=float(rope.get("rope_theta") or source.get("rope_theta") or 10_000.0),
        tie_embeddings=_flag(source, "tie_word_embeddings", False),
    )


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
        "attention_bias": config.attention_bias,
        "mlp_bias": config.feedforward_bias,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
    }


def _read_xglm(source: Mapping[str, Any]) -> ModelConfig:
    _want("activation_function", source.get("activation_function", "gelu"), ["gelu"])
    _want("add_cross_attention", source.get("add_cross_attention", False), [False])
    width, heads = _count(source, "d_model"), _count(source, "attention_heads")
    return ModelConfig(
        vocabulary_size=_count(source, "vocab_size"),
        width=width,
        feedforward_width=_count(source, "ffn_dim"),
        layer_count=_count(source, "num_layers"),
        head_count=heads,
        key_head_count=heads,
        head_size=width // heads,
        max_length=_count(source, "max_position_embeddings", 2048),
        norm="layer",
        norm_epsilon=1e-5,
        activation="gelu",
        gated=False,
        attention_bias=True,
        feedforward_bias=True,
        positions="sinusoidal",
        position_offset=2,
        embedding_scale=width**0.5 if _flag(source, "scale_embedding", True) else 1.0,
        tie_embeddings=_flag(source, "tie_word_embeddings", True),
    )


def _write_xglm(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["XGLMForCausalLM"],
        "model_type": "xglm",
        "vocab_size": config.vocabulary_size,
        "d_model": config.width,
        "ffn_dim": config.feedforward_width,
        "num_layers": config.layer_count,
        "attention_heads": config.head_count,
        "max_position_embeddings": config.max_length,
        "activation_function": "gelu",
        "scale_embedding": config.embedding_scale != 1.0,
        "tie_word_embeddings": config.tie_embeddings,
    }


FAMILIES: Mapping[str, Family] = {
    # Touvron et al. 2023, arXiv 2302.13971; transformers `LlamaForCausalLM`.
    "llama": Family(
        read=_read_llama,
        write=_write_llama,
        keys={
            "model.embed_tokens.weight": "embedding",
            "lm_head.weight": "head",
            **_norm("model.norm", "norm"),
            **_norm("model.layers.{}.input_layernorm", "blocks/attention_norm"),
            **_linear("model.layers.{}.self_attn.q_proj", "blocks/query"),
            **_linear("model.layers.{}.self_attn.k_proj", "blocks/key"),
            **_linear("model.layers.{}.self_attn.v_proj", "blocks/value"),
            **_linear("model.layers.{}.self_attn.o_proj", "blocks/output"),
            **_norm("model.layers.{}.post_attention_layernorm", "blocks/feedforward_norm"),
            **_linear("model.layers.{}.mlp.gate_proj", "blocks/gate"),
            **_linear("model.layers.{}.mlp.up_proj", "blocks/up"),
            **_linear("model.layers.{}.mlp.down_proj", "blocks/down"),
        },
        ignored=("rotary_emb.inv_freq",),
    ),
    # Lin et al. 2022, arXiv 2112.10668; transformers `XGLMForCausalLM`.
    "xglm": Family(
        read=_read_xglm,
        write=_write_xglm,
        keys={
            "model.embed_tokens.weight": "embedding",
            "lm_head.weight": "head",
            **_norm("model.layer_norm", "norm"),
            **_norm("model.layers.{}.self_attn_layer_norm", "blocks/attention_norm"),
            **_linear("model.layers.{}.self_attn.q_proj", "blocks/query"),
            **_linear("model.layers.{}.self_attn.k_proj", "blocks/key"),
            **_linear("model.layers.{}.self_attn.v_proj", "blocks/value"),
            **_linear("model.layers.{}.self_attn.out_proj", "blocks/output"),
            **_norm("model.layers.{}.final_layer_norm", "blocks/feedforward_norm"),
            **_linear("model.layers.{}.fc1", "blocks/up"),
            **_linear("model.layers.{}.fc2", "blocks/down"),
        },
        ignored=("embed_positions.weights",),
    ),
}


def family(model_type: str) -> Family:
    """The family of a checkpoint; an unknown one is the user's mistake."""
    if model_type not in FAMILIES:
        raise UserError(f"model_type {model_type!r} is not known; known: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def hub_config(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """config.json of a model that is made here; settings that would not come back from a checkpoint
    of this family are refused."""
    written = family(model_type).write(config)
    try:
        back = family(model_type).read(written)
    except ValueError as error:
        raise UserError(f"model_type {model_type}: {error}") from None
    misfits = [
        f"model.{name}={value} (wanted {wanted})"
        for name, value in asdict(config).items()
        if value != (wanted := getattr(back, name))
    ]
    if misfits:
        raise UserError(f"model_type {model_type} does not go with {', '.join(misfits)}")
    return written


def _count(source: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number of config.json; null is taken for a missing one where there is a default."""
    value = source[name] if default is None else source.get(name)
    value = default if value is None and default is not None else value
    if type(value) is not int or value < 1:
        raise UserError(f"{name} must be a whole number of 1 or more; config.json has {value!r}")
    return value


def _flag(source: Mapping[str, Any], name: str, default: bool) -> bool:
    value = source.get(name, default)
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false; config.json has {value!r}")
    return value


def _want(name: str, value: Any, known: list[Any]) -> None:
    if value not in known:
        wanted = " or ".join(map(str, known))
        raise UserError(f"{name} must be {wanted} for this model; config.json has {value}")
