"""config.json as other versions and people write it: read as transformers reads it, or refused."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from flax import nnx
from hub_models import CONFIGS, FAMILIES, RECENT, auto_model, random_tokens, saved

from clustering.errors import UserError
from xelm.models.checkpoint import load_model, read_config, save_model
from xelm.models.families import FAMILIES as KNOWN
from xelm.models.families import hub_config, model_config, writable_as
from xelm.models.mixture import mixture_shape

LINEAR = {"rope_type": "linear", "factor": 4.0}
SHORT = [1.0, 1.25, 1.5, 2.0, 3.0, 4.5]
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
UNROUNDED = {
    kind: {"rope_theta": 300.0, **YARN, "truncate": False}
    for kind in ("full_attention", "sliding_attention")
}
logits_of = nnx.jit(lambda model, tokens: model(tokens))


# Files as older or other versions wrote them, and as people edit them.
EDITED = {
    "llama-grouped": [
        {"rope_parameters": None, "rope_theta": 300.0},
        {"rope_parameters": None, "rope_theta": 300.0, "rope_scaling": LINEAR},
        {"rope_scaling": LINEAR},
        {"rms_norm_eps": None, "rope_parameters": None},
        {"hidden_act": "gelu_new"},
    ],
    "mistral-local": [
        {"sliding_window": None},
        {"layer_types": ["full_attention"] * 3},
    ],
    "qwen2-partly-local-tied": [
        {"layer_types": None, "max_window_layers": 2},
        {"layer_types": None, "use_sliding_window": False},
        {"layer_types": None, "sliding_window": None},
    ],
    "qwen3": [{"rope_parameters": None, "rope_scaling": {**YARN, "type": "yarn"}}],
    "phi3-longrope-partial": [
        {
            "rope_parameters": None,
            "rope_theta": 300.0,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": [9.0] * 6},
        },
        {"rope_parameters": {"rope_type": "yarn", "short_factor": SHORT, "long_factor": SHORT}}
        | {"partial_rotary_factor": 0.75},
        {"original_max_position_embeddings": 256},
        {"max_position_embeddings": 4096, "sliding_window": 9},
    ],
    "ministral3": [{"rope_parameters": None}, {"sliding_window": 9}],
    "olmo2": [{"rope_parameters": None, "rope_theta": 300.0}],
    "olmo3": [
        {"rope_parameters": None, "rope_theta": 300.0, "rope_scaling": YARN},
        {"layer_types": None, "sliding_window": 5},
        {"layer_types": ["full_attention"] * 4},
    ],
    "smollm3": [
        {"rope_parameters": None, "rope_theta": 5e6, "no_rope_layers": None},
        {"no_rope_layers": [0, 0, 0], "layer_types": None, "sliding_window": 4},
        {"no_rope_layers": [1, 1, 1, 0, 1]},
    ],
    "smollm3-local": [{"layer_types": ["full_attention"] + ["sliding_attention"] * 2}],
    "apertus": [
        {"rope_parameters": None, "rope_theta": 300.0},
        {"mlp_bias": False, "qk_norm": True, "post_norm": False},
    ],
    "cohere": [
        {"rope_parameters": None, "rope_theta": 300.0, "rope_scaling": LINEAR},
        {"head_dim": 8, "logit_scale": None},
    ],
    "cohere2": [
        {"layer_types": None, "sliding_window_pattern": 3, "rotary_pct": 1.0},
        {"layer_types": ["full_attention"] * 3},
    ],
    "gemma2": [
        {"layer_types": None, "rope_parameters": None, "rope_theta": 50.0},
        {"attn_logit_softcapping": None, "query_pre_attn_scalar": 7},
    ],
    "gemma3": [
        {"layer_types": None, "sliding_window_pattern": 3, "rope_parameters": None},
        {"rope_parameters": None, "rope_theta": 5e4, "rope_local_base_freq": 70.0},
        {"rope_parameters": None, "rope_theta": 5e4, "rope_scaling": LINEAR},
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ],
    "xglm": [{"scale_embedding": False}, {"activation_function": "relu"}],
    "bloom": [{"hidden_size": None, "n_embed": 36}],
    "gpt2": [{"n_embd": None, "hidden_size": 36}, {"activation_function": "relu"}],
    "qwen3_moe": [{"norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 9}],
    "olmoe": [{"norm_topk_prob": True, "rope_parameters": None, "rope_theta": 300.0}],
    "granite": [
        {"rope_parameters": None, "rope_theta": 300.0, "rope_scaling": None},
        {"logits_scaling": 8, "embedding_multiplier": 12, "residual_multiplier": 1},
    ],
    "gpt_neox-partial": [
        {"rope_parameters": None, "rotary_pct": 0.75, "rotary_emb_base": 300},
        {"rope_parameters": None, "hidden_act": "gelu_fast"},
        {"use_parallel_residual": False},
    ],
    "opt": [{"word_embed_proj_dim": None, "activation_function": "gelu"}],
    "falcon": [
        {"rope_parameters": None, "rope_theta": 300.0, "multi_query": False, "n_head": 6},
        {"hidden_size": None, "n_embed": 48},
    ],
    "falcon-two-norms": [{"num_ln_in_parallel_attn": None}],
    "falcon-one-key-head": [{"num_kv_heads": 6}, {"num_ln_in_parallel_attn": 1}],
    "stablelm": [
        {"rope_parameters": None, "rope_theta": 300.0, "partial_rotary_factor": 0.5},
        {"rope_parameters": None},
    ],
    "hunyuan": [
        {
            "rope_parameters": None,
            "rope_theta": 300.0,
            "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "mscale": 1.0},
        },
        {"rope_parameters": None, "use_qk_norm": True},
    ],
    "roberta": [{"layer_norm_eps": 1e-3}],
    "eurobert": [
        {
            "rope_parameters": None,
            "rope_theta": 300.0,
            "rope_scaling": None,
            "auto_map": {"AutoModelForMaskedLM": "modeling_eurobert.EuroBertForMaskedLM"},
        }
    ],
    "bert": [{"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}],
    "xlm-roberta": [{"layer_norm_eps": 1e-3}],
    "modernbert": [
        {"layer_types": None, "global_attn_every_n_layers": 2, "rope_parameters": None},
        {"rope_parameters": None, "global_rope_theta": 50.0, "local_rope_theta": 30.0},
    ],
}


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        pytest.param(name, edit, marks=[pytest.mark.slow] * name.startswith(RECENT))
        for name, edits in EDITED.items()
        for edit in edits
    ],
)
def test_other_ways_to_write_a_config_mean_what_they_mean_to_transformers(name, edit, tmp_path):
    pair = saved(CONFIGS[name], tmp_path / "hub")
    path = pair.directory / "config.json"
    edited = {**json.loads(path.read_text()), **edit}
    # None takes an entry out, save where null itself has a meaning.
    kept = ("sliding_window", "attn_logit_softcapping")
    edited = {key: value for key, value in edited.items() if value is not None or key in kept}
    path.write_text(json.dumps(edited))
    reference = auto_model(pair.directory)
    tokens = random_tokens((1, 40))
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens)).logits.numpy()
    logits = logits_of(load_model(pair.directory), tokens)
    np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "edit", "fault"),
    [
        ("llama-grouped", {"hidden_act": "mish"}, "hidden_act must be silu or .*; .* has mish"),
        ("llama-grouped", {"rope_parameters": {**LINEAR, "rope_type": "longrope"}}, "rope_type"),
        ("llama-grouped", {"hidden_size": "32"}, "hidden_size.*expected int, got str"),
        ("llama-grouped", {"num_attention_heads": 3}, "multiple"),
        ("llama-grouped", {"model_type": "t5"}, "'t5' is not known; known: llama, mistral"),
        ("llama-grouped", {"model_type": "gemma4"}, "'gemma4': its layers .*; take a Gemma 3,"),
        ("llama-grouped", {"model_type": "qwen3_5_text"}, "gated delta nets .*; take a Qwen 3,"),
        ("llama-grouped", {"model_type": None}, "model_type None is not known"),
        ("llama-grouped", {"model_type": ["llama"]}, "is not known"),
        ("llama-grouped", {"quantization_config": "gptq"}, "quantised weights are not supported"),
        ("phi3-local", {"rope_parameters": {**LINEAR}}, "must be one of .'longrope'., got linear"),
        ("llama-grouped", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers must be"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step must be 1"),
        ("olmoe", {"clip_qkv": 3.0}, "clip_qkv must be None"),
        ("granite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
        ("gpt_neox-partial", {"hidden_act": "mish"}, "hidden_act must be silu or .*; .* has mish"),
        ("gpt_neox-partial", {"head_dim": 8}, "head_dim must be None or 16 for this model"),
        ("qwen2-yarn", {"rope_parameters": {**YARN, "factor": None}}, ": factor must be a number"),
        ("opt", {"word_embed_proj_dim": 18}, "word_embed_proj_dim must be 36 .* has 18"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine must be"),
        ("falcon-sequential", {"alibi": True}, "alibi must be False"),
        ("falcon", {"parallel_attn": False}, "parallel_attn must be True"),
        ("falcon-one-key-head", {"num_ln_in_parallel_attn": 2}, "num_ln_.* must be None or 1"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm must be False"),
        ("hunyuan", {"head_dim": None}, "head_dim must be a number"),
        ("hunyuan", {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, "rope_type must be"),
        ("roberta", {"is_decoder": True}, "is_decoder must be False"),
        ("camembert", {"hidden_act": "relu"}, "hidden_act must be gelu"),
        ("ministral", {"head_dim": None}, "head_dim must be a number"),
        ("xlm-roberta", {"pad_token_id": None}, "pad_token_id must be a number"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"] * 2}, "layer_types"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "sliding_window must be a number"),
        ("ministral3", {"rope_parameters": YARN}, "llama_4_scaling_beta and .* must be numbers"),
        ("olmo3", {"rope_parameters": UNROUNDED}, "truncate must be True .* has False"),
        ("olmo3", {"sliding_window": None}, "sliding_window must be a number"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must have 3 entries"),
        ("smollm3-local", {"use_sliding_window": False}, "use_sliding_window must be True"),
        ("apertus", {"hidden_act": "silu"}, "hidden_act must be xielu"),
        ("cohere", {"logit_scale": None}, "logit_scale must be a number"),
        ("cohere2", {"hidden_act": "mish"}, "hidden_act must be silu"),
        ("xglm", {"pad_token_id": 5}, "pad_token_id must be None or 0 or 1"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
        ("bert", {"position_embedding_type": "relative_key"}, "must be absolute"),
        ("xlm-roberta", {"hidden_act": "relu"}, "hidden_act must be gelu"),
        ("modernbert", {"classifier_activation": "relu"}, "classifier_activation must be gelu"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(name, edit, fault, tmp_path):
    config = CONFIGS[name].to_dict() | edit
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=fault):
        read_config(tmp_path)


@pytest.mark.parametrize("kinds", [["full_attention"] * 3, None], ids=["all", "null"])
def test_mistral_with_layer_types_is_a_ministral(kinds, tmp_path):
    """transformers choose the family by the key alone, whatever stands there."""
    directory = saved(CONFIGS["mistral-local"], tmp_path / "hub").directory
    source = json.loads((directory / "config.json").read_text()) | {"layer_types": kinds}
    (directory / "config.json").write_text(json.dumps(source))
    reference = auto_model(directory)
    assert type(reference).__name__ == "MinistralForCausalLM"
    assert read_config(directory).local_layers == (() if kinds else (0, 1, 2))
    save_model(load_model(directory), tmp_path / "out")
    assert type(auto_model(tmp_path / "out")).__name__ == "MinistralForCausalLM"
    tokens = random_tokens((1, 40))
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(load_model(directory), tokens), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [("configuration_files", ["config.5.0.0.json"]), ("transformers_weights", "a.safetensors")],
)
def test_settings_by_which_transformers_read_other_files_are_refused(name, value, llama):
    source = json.loads((llama / "config.json").read_text()) | {name: value}
    (llama / "config.json").write_text(json.dumps(source))
    with pytest.raises(UserError, match=f"{name} is not read"):
        load_model(llama)


def test_nothing_longer_than_the_original_length_is_read_by_longrope(tmp_path):
    """From the next token on transformers rotates all positions by other frequencies."""
    pair = saved(CONFIGS["phi3-longrope-partial"], tmp_path / "hub")
    model = load_model(pair.directory)
    assert model.config.max_length == 192
    tokens = random_tokens((1, 193))
    with pytest.raises(UserError, match=r"at most 192 tokens.* longrope .*got 193"):
        logits_of(model, tokens)
    with torch.no_grad():
        whole = pair.reference(torch.tensor(tokens)).logits[0, :192].numpy()
        part = pair.reference(torch.tensor(tokens[:, :192])).logits[0].numpy()
    assert np.abs(whole - part).max() > 1e-3
    np.testing.assert_allclose(logits_of(model, tokens[:, :192])[0], part, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n in FAMILIES and n.startswith(RECENT)])
def test_a_shape_that_mixtral_and_llama_lack_is_not_written_as_one_of_theirs(name):
    shape = model_config(CONFIGS[name].to_dict())
    with pytest.raises(UserError, match=r"^model_type mixtral(:| does not go with) [^\n]*$"):
        hub_config("mixtral", mixture_shape(shape, 2, 1))
    with pytest.raises(UserError, match="name a checkpoint of the same shape"):
        writable_as(shape)


@pytest.mark.parametrize("kind", KNOWN)
def test_each_parameter_has_one_row_in_the_table_of_a_family(kind):
    """A second one, left over from the table that a family began with, is a missing tensor."""
    rows = Counter(path for tensor in KNOWN[kind].tensors.values() for path in tensor.paths)
    assert [path for path, count in rows.items() if count > 1] == []
