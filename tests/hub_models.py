"""Tiny random models made by transformers, of every family, in settings that are easy to get
wrong."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers as hub
from safetensors.numpy import load_file, save_file

VOCABULARY = 97
INDEX = "model.safetensors.index.json"
_ROPE = {"rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**LLAMA, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 20}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 36,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_XGLM = {
    "vocab_size": VOCABULARY,
    "d_model": 36,
    "ffn_dim": 60,
    "num_layers": 2,
    "attention_heads": 3,
    "max_position_embeddings": 256,
}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 36, "n_layer": 2, "n_head": 6}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "max_position_embeddings": 256,
}
_NEOX = {**LLAMA, "num_attention_heads": 2, "num_hidden_layers": 2}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "ffn_dim": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 256,
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "ffn_hidden_size": 60,
    **{"bos_token_id": 1, "eos_token_id": 2},
}
_MODERNBERT = {
    **_BERT,
    "num_hidden_layers": 4,
    "local_attention": 10,
    **{"pad_token_id": 0, "cls_token_id": 1, "bos_token_id": 1},
    **{"sep_token_id": 2, "eos_token_id": 2},
}

CONFIGS: dict[str, Any] = {
    "llama-grouped": hub.LlamaConfig(**LLAMA, head_dim=12),
    "llama-one-key-head-tied": hub.LlamaConfig(
        **{**LLAMA, "num_key_value_heads": 1, "vocab_size": 101},
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    ),
    "llama-all-heads-biased": hub.LlamaConfig(
        **{**LLAMA, "num_key_value_heads": 4},
        attention_bias=True,
        mlp_bias=True,
        rms_norm_eps=1e-5,
    ),
    "llama-linear": hub.LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama3": hub.LlamaConfig(
        **LLAMA,
        head_dim=16,
        rope_parameters={
            **{"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            **_ROPE,
        },
    ),
    "mistral-local": hub.MistralConfig(**LLAMA, sliding_window=9),
    "mistral-global": hub.MistralConfig(**LLAMA, sliding_window=None, head_dim=10),
    "ministral": hub.MinistralConfig(
        **LLAMA,
        head_dim=12,
        sliding_window=9,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "mixtral": hub.MixtralConfig(**LLAMA, num_local_experts=5, num_experts_per_tok=2, head_dim=12),
    "mixtral-local-one-expert-tied": hub.MixtralConfig(
        **LLAMA,
        num_local_experts=3,
        num_experts_per_tok=1,
        sliding_window=9,
        tie_word_embeddings=True,
    ),
    "qwen2-yarn": hub.Qwen2Config(**LLAMA, rope_parameters={"rope_type": "yarn", **_ROPE}),
    "qwen2-partly-local-tied": hub.Qwen2Config(
        **LLAMA,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3": hub.Qwen3Config(**LLAMA, head_dim=12, attention_bias=True),
    "qwen3-one-key-head": hub.Qwen3Config(
        **{**LLAMA, "num_key_value_heads": 1}, tie_word_embeddings=True
    ),
    "phi3-longrope-partial": hub.Phi3Config(
        **{**LLAMA, "hidden_size": 64},
        original_max_position_embeddings=192,
        tie_word_embeddings=True,
        pad_token_id=0,
        rope_parameters={
            **{"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
            "short_factor": [1.0, 1.1, 1.2, 1.4, 1.8, 2.5],
            "long_factor": [1.5, 2.0, 3.0, 5.0, 9.0, 20.0],
        },
    ),
    "phi3-local": hub.Phi3Config(**LLAMA, sliding_window=9, pad_token_id=0),
    "ministral3": hub.Ministral3Config(
        **LLAMA,
        head_dim=12,
        rope_parameters={
            **{"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.5},
            **_ROPE,
            "llama_4_scaling_beta": 0.7,
        },
    ),
    "ministral3-local-tied": hub.Ministral3Config(
        **{**LLAMA, "num_key_value_heads": 1},
        head_dim=8,
        sliding_window=9,
        tie_word_embeddings=True,
        rope_parameters={
            **{"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1},
            "original_max_position_embeddings": 7,
        },
    ),
    "olmo2": hub.Olmo2Config(**LLAMA, attention_bias=True, rms_norm_eps=1e-4),
    "olmo3": hub.Olmo3Config(
        **{**LLAMA, "num_hidden_layers": 4},
        sliding_window=9,
        rope_parameters={
            "full_attention": {"rope_type": "yarn", **_ROPE},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
    ),
    "smollm3": hub.SmolLM3Config(**LLAMA, no_rope_layers=[1, 0, 1, 1], pad_token_id=3),
    "smollm3-local": hub.SmolLM3Config(
        **{**LLAMA, "pad_token_id": 3},
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=9,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    ),
    "apertus": hub.ApertusConfig(
        **LLAMA, head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    ),
    "apertus-biased": hub.ApertusConfig(
        **{**LLAMA, "num_key_value_heads": None}, attention_bias=True, tie_word_embeddings=True
    ),
    "cohere": hub.CohereConfig(**LLAMA, logit_scale=0.3, use_qk_norm=True),
    "cohere-untied": hub.CohereConfig(
        **LLAMA, attention_bias=True, layer_norm_eps=1e-4, tie_word_embeddings=False
    ),
    "cohere2": hub.Cohere2Config(
        **LLAMA, logit_scale=0.3, sliding_window=9, sliding_window_pattern=2
    ),
    "gemma2": hub.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma2-uncapped": hub.Gemma2Config(
        **{**GEMMA, "num_key_value_heads": 4, "vocab_size": 101},
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        attention_bias=True,
    ),
    "gemma3": hub.Gemma3TextConfig(**GEMMA, sliding_window_pattern=2),
    "gemma3-stretched": hub.Gemma3TextConfig(
        **{**GEMMA, "num_key_value_heads": 1},
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "xglm": hub.XGLMConfig(**_XGLM),
    "xglm-unscaled": hub.XGLMConfig(**{**_XGLM, "vocab_size": 64}, scale_embedding=False),
    "bloom": hub.BloomConfig(**_BLOOM),
    "bloom-untied": hub.BloomConfig(**{**_BLOOM, "n_head": 4}, tie_word_embeddings=False),
    "gpt2": hub.GPT2Config(**_GPT2),
    "gpt2-untied": hub.GPT2Config(**_GPT2, n_inner=50, tie_word_embeddings=False),
    "qwen3_moe": hub.Qwen3MoeConfig(
        **LLAMA, head_dim=12, moe_intermediate_size=20, num_experts=5, num_experts_per_tok=2
    ),
    "qwen3_moe-local-scaled": hub.Qwen3MoeConfig(
        **LLAMA,
        head_dim=12,
        moe_intermediate_size=20,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=9,
    ),
    "olmoe": hub.OlmoeConfig(
        # With few layers, bfloat16 sends no token of the tests to another expert.
        **{**LLAMA, "num_hidden_layers": 2},
        num_experts=5,
        num_experts_per_tok=2,
        pad_token_id=0,
        rms_norm_eps=1e-4,
    ),
    "granite": hub.GraniteConfig(
        **LLAMA,
        embedding_multiplier=5,
        attention_multiplier=0.2,
        residual_multiplier=0.3,
        logits_scaling=3.0,
        attention_bias=True,
        mlp_bias=True,
    ),
    "gpt_neox-partial": hub.GPTNeoXConfig(
        **_NEOX, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "gpt_neox-sequential-yarn": hub.GPTNeoXConfig(
        **_NEOX,
        use_parallel_residual=False,
        attention_bias=False,
        hidden_act="gelu_new",
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "yarn", "partial_rotary_factor": 0.75, **_ROPE},
    ),
    "opt": hub.OPTConfig(**_OPT),
    "opt-after-unbiased": hub.OPTConfig(
        **_OPT, do_layer_norm_before=False, enable_bias=False, activation_function="gelu"
    ),
    "falcon": hub.FalconConfig(
        **_FALCON,
        new_decoder_architecture=True,
        num_ln_in_parallel_attn=1,
        num_kv_heads=2,
        bias=True,
    ),
    "falcon-two-norms": hub.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=3),
    "falcon-one-key-head": hub.FalconConfig(**_FALCON, tie_word_embeddings=False),
    "falcon-sequential": hub.FalconConfig(
        **_FALCON, multi_query=False, parallel_attn=False, bias=True, activation="relu"
    ),
    "stablelm": hub.StableLmConfig(**LLAMA, use_qkv_bias=True),
    "stablelm-parallel": hub.StableLmConfig(
        **{**LLAMA, "hidden_size": 64}, use_parallel_residual=True, partial_rotary_factor=0.75
    ),
    "hunyuan": hub.HunYuanDenseV1Config(
        **LLAMA,
        head_dim=12,
        attention_bias=True,
        rope_parameters={"rope_type": "dynamic", "alpha": 50.0, "rope_theta": 1e4, "factor": 1.0},
    ),
    "bert": hub.BertConfig(**_BERT),
    "roberta": hub.RobertaConfig(**_BERT, layer_norm_eps=1e-5),
    "camembert": hub.CamembertConfig(**_BERT, type_vocab_size=1),
    "eurobert": hub.EuroBertConfig(
        **LLAMA, head_dim=12, mlp_bias=True, **{"pad_token_id": 2, "mask_token_id": 3}
    ),
    "eurobert-tied": hub.EuroBertConfig(
        **LLAMA, attention_bias=True, tie_word_embeddings=True, pad_token_id=0, mask_token_id=3
    ),
    "xlm-roberta": hub.XLMRobertaConfig(**_BERT, type_vocab_size=1),
    "modernbert": hub.ModernBertConfig(**_MODERNBERT),
    "modernbert-biased": hub.ModernBertConfig(
        **_MODERNBERT,
        norm_bias=True,
        attention_bias=True,
        mlp_bias=True,
        decoder_bias=False,
        classifier_bias=True,
        tie_word_embeddings=False,
    ),
}
ENCODERS = ("bert", "roberta", "camembert", "xlm-roberta", "modernbert", "eurobert")
DECODERS = tuple(name for name in CONFIGS if not name.startswith(ENCODERS))
# One of each family.
FAMILIES = (
    *(
        "llama3",
        "mistral-local",
        "ministral",
        "mixtral",
        "qwen2-partly-local-tied",
        "qwen3",
        "phi3-longrope-partial",
        *("ministral3", "olmo2", "olmo3", "smollm3", "apertus", "cohere", "cohere2"),
        "gemma2",
        "gemma3",
    ),
    "granite",
    "gpt_neox-partial",
    *("qwen3_moe", "olmoe"),
    "opt",
    "falcon",
    "stablelm",
    "hunyuan",
    *("xglm", "bloom", "gpt2", *ENCODERS),
)

# What differs most; the others of `FAMILIES` are for the slow suite.
QUICK = ("llama3", "gemma2", "gpt2", "bert", "modernbert")


def by_speed(names: Sequence[str]) -> list[Any]:
    """Parameters of a test, marked slow but for those of `QUICK`."""
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


RECENT = (
    *("ministral3", "olmo", "smollm3", "apertus", "cohere"),
    "phi3",
    *("qwen3_moe", "olmoe"),
    "granite",
    "gpt_neox",
    "opt",
    "falcon",
    "stablelm",
    "hunyuan",
    *("roberta", "camembert"),
    "eurobert",
)
"""Starts of names that are read once in the fast suite; all else about them is for the slow one."""


def once(names: Sequence[str]) -> list[Any]:
    """Parameters of a test, marked slow where they are `RECENT` and not the first of a family."""
    return [
        pytest.param(name, marks=pytest.mark.slow)
        if name.startswith(RECENT) and name not in FAMILIES
        else name
        for name in names
    ]


@dataclass(frozen=True)
class Pair:
    """A random model of transformers and the directory it was saved to."""

    reference: Any
    directory: Path

    @property
    def masked(self) -> bool:
        """An encoder."""
        return self.reference.config.model_type in ENCODERS


def auto_class(model_type: str) -> Any:
    """The Auto class of transformers that a family's models are loaded by."""
    return hub.AutoModelForMaskedLM if model_type in ENCODERS else hub.AutoModelForCausalLM


def auto_model(directory: Path) -> Any:
    """What transformers makes of a checkpoint directory when nobody names a class."""
    kind = auto_class(hub.AutoConfig.from_pretrained(directory).model_type)
    return kind.from_pretrained(directory, attn_implementation="eager", dtype="float32").eval()


def random_model(config: Any) -> Any:
    """With nothing at its initial zero or one, and no dropout."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)  # a model writes into its own
    model = auto_class(config.model_type).from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradients_of(model: Any) -> dict[str, np.ndarray]:
    """Gradients by the names of stored tensors. Ties have two names; transformers joins matrices of
    a layer's experts, which are stored one by one."""
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        gradient = found[name] = parameter.grad.numpy()
        if name == "lm_head.weight":
            found["embed_out.weight"] = gradient  # GPT-NeoX
        if model.config.model_type in ("qwen3_moe", "olmoe") and ".mlp.experts." in name:
            for number, one in enumerate(gradient):
                expert = f"{name.rpartition('.')[0]}.{number}"
                parts = np.split(one, 2) if "gate_up" in name else [one]
                names = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
                found |= {f"{expert}.{part}.weight": each for part, each in zip(names, parts)}
        if model.config.model_type == "mixtral" and ".mlp." in name:
            stem = name.replace(".mlp.", ".block_sparse_moe.")
            found[stem] = gradient
            for number, one in enumerate(gradient):
                expert = f"{stem.rpartition('.')[0]}.{number}"
                if "down" in name:
                    found[f"{expert}.w2.weight"] = one
                elif "gate_up" in name:
                    found[f"{expert}.w1.weight"], found[f"{expert}.w3.weight"] = np.split(one, 2)
    return found


def saved(config: Any, directory: Path) -> Pair:
    """A random model and its files in `directory`, as transformers loads them from there."""
    random_model(config).save_pretrained(directory)
    return Pair(auto_model(directory), directory)


def random_tokens(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Ids of no special token."""
    return np.random.default_rng(seed).integers(4, 64, shape)


def change(directory, edit):
    """Edits the tensors of a checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def assert_equal_trees(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
