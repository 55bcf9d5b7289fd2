"""Configurations as they are published on the Hub mean the shapes that their weights have."""

import pytest

from xelm.models.families import model_config

_SMOLLM3 = {
    **{"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11_008},
    **{"num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4},
    **{"max_position_embeddings": 65_536, "vocab_size": 128_256, "rope_theta": 5e6},
    **{"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "rope_scaling": None},
    **{"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28},
}
_OLMO2 = {
    **{"model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11_008},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    **{"max_position_embeddings": 4096, "vocab_size": 100_352, "rope_theta": 500_000},
    **{"rms_norm_eps": 1e-6, "rope_scaling": None, "tie_word_embeddings": False},
}
_APERTUS = {
    **{"model_type": "apertus", "hidden_size": 4096, "intermediate_size": 21_504},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"max_position_embeddings": 65_536, "vocab_size": 131_072, "rope_theta": 12_000_000},
    **{"mlp_bias": False, "post_norm": False, "qk_norm": True, "hidden_act": "xielu"},
    "rope_scaling": {
        **{"rope_type": "llama3", "type": "llama3", "factor": 8.0},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 8192,
    },
}
_AYA = {
    **{"model_type": "cohere", "hidden_size": 4096, "intermediate_size": 14_336},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"max_position_embeddings": 8192, "vocab_size": 256_000, "rope_theta": 10_000},
    **{"logit_scale": 0.0625, "layer_norm_eps": 1e-5, "use_qk_norm": False},
}
_COMMAND = _AYA | {
    **{"model_type": "cohere2", "head_dim": 128, "logit_scale": 0.25, "rope_theta": 50_000},
    **{"sliding_window": 4096, "sliding_window_pattern": 4, "layer_switch": 4},
    **{"position_embedding_type": "rope_gptj", "rotary_pct": 1.0, "cache_implementation": "hybrid"},
    **{"order_of_interleaved_layers": "local_attn_first", "use_parallel_block": True},
}
_GEMMA3 = {
    **{"model_type": "gemma3", "eos_token_id": [1, 106], "mm_tokens_per_image": 256},
    "text_config": {
        **{"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240},
        **{"num_hidden_layers": 34, "sliding_window": 1024},
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
}
_PHI3 = {
    **{"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 32_064},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    **{"max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    **{"rope_scaling": None, "rope_theta": 10_000.0, "sliding_window": 2047},
}
_PHI4_MINI = _PHI3 | {
    **{"vocab_size": 200_064, "num_attention_heads": 24, "num_key_value_heads": 8},
    **{"max_position_embeddings": 131_072, "partial_rotary_factor": 0.75},
    **{"sliding_window": 262_144, "tie_word_embeddings": True, "pad_token_id": 199_999},
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
}
_GRANITE = {
    **{"model_type": "granite", "hidden_size": 2048, "intermediate_size": 8192},
    **{"num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"vocab_size": 49_155, "tie_word_embeddings": True, "attention_multiplier": 0.015625},
    **{"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
}
_PYTHIA = {
    **{"model_type": "gpt_neox", "hidden_size": 768, "intermediate_size": 3072},
    **{"num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 50_304},
    **{"max_position_embeddings": 2048, "rotary_pct": 0.25, "rotary_emb_base": 10_000},
    **{"use_parallel_residual": True, "tie_word_embeddings": False, "hidden_act": "gelu"},
}
_OPT = {
    **{"model_type": "opt", "hidden_size": 768, "ffn_dim": 3072, "vocab_size": 50_272},
    **{"num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 2048},
    **{"word_embed_proj_dim": 768, "do_layer_norm_before": True, "prefix": "</s>"},
    **{"_remove_final_layer_norm": False, "activation_function": "relu"},
}
_FALCON = {
    **{"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_kv_heads": 71},
    **{"num_attention_heads": 71, "vocab_size": 65_024, "alibi": False, "bias": False},
    **{"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True},
    "apply_residual_connection_post_layernorm": False,
}
_STABLELM = {
    **{"model_type": "stablelm", "hidden_size": 2048, "intermediate_size": 5632},
    **{"num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32},
    **{"vocab_size": 100_352, "partial_rotary_factor": 0.25, "use_qkv_bias": True},
    **{"rope_theta": 10_000, "tie_word_embeddings": False, "layer_norm_eps": 1e-5},
}
_ROBERTA = {
    **{"model_type": "roberta", "hidden_size": 768, "intermediate_size": 3072},
    **{"num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 514},
    **{"vocab_size": 50_265, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5},
}
_OLMOE = {
    **{"model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024},
    **{"num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16},
    **{"vocab_size": 50_304, "num_experts": 64, "num_experts_per_tok": 8, "clip_qkv": None},
}
_QWEN3_MOE = {
    **{"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144},
    **{"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4},
    **{"vocab_size": 151_936, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128},
    **{"moe_intermediate_size": 768, "norm_topk_prob": True, "mlp_only_layers": []},
    **{"decoder_sparse_step": 1, "use_sliding_window": False, "sliding_window": None},
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (_SMOLLM3, 3_075_098_624),
        (_OLMO2, 7_298_617_344),
        (_APERTUS, 8_053_338_176),
        (_AYA, 8_028_033_024),
        (_COMMAND, 8_028_033_024),
        (_PHI3, 3_821_079_552),
        (_PHI4_MINI, 3_836_021_760),
        (_GRANITE, 2_533_531_648),
        (_PYTHIA, 162_322_944),
        (_OPT, 125_239_296),
        (_FALCON, 6_921_720_704),
        (_STABLELM, 1_644_515_328),
        (_ROBERTA, 124_697_433),
        (_OLMOE, 6_919_161_856),
        (_QWEN3_MOE, 30_532_122_624),
        # 4,300,079,472 less those of the image encoder and of the projection of images.
        (_GEMMA3, 3_880_263_168),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_a_published_configuration_has_the_parameters_of_its_weights(config, parameters):
    assert model_config(config).parameter_count == parameters


def test_published_configurations_have_their_layers_and_positions():
    smollm, command, gemma = map(model_config, (_SMOLLM3, _COMMAND, _GEMMA3))
    assert smollm.nope_layers == (*command.nope_layers, 35) == tuple(range(3, 36, 4))
    assert command.local_layers == tuple(n for n in range(32) if n % 4 != 3)
    assert command.rope.interleaved and command.logit_scale == 0.25
    assert gemma.local_layers == tuple(n for n in range(34) if n % 6 != 5)
    assert (gemma.rope.theta, gemma.rope.factor) == (1e6, 8.0)
    assert gemma.local_rope is not None and gemma.local_rope.theta == 1e4
    assert model_config(_APERTUS).rope.scaling == "llama3"


def test_published_configurations_have_their_factors_and_rotated_parts():
    phi3, phi4, granite, pythia = map(model_config, (_PHI3, _PHI4_MINI, _GRANITE, _PYTHIA))
    assert phi3.local_layers == tuple(range(32)) and phi3.rope.rotated(phi3.head_size) == 96
    assert (phi4.max_length, phi4.rope.rotated(phi4.head_size)) == (4096, 96)
    assert phi4.rope.amplitude == pytest.approx((1 + 5 / 12) ** 0.5)  # of 2^17 and 2^12 tokens
    assert (granite.embedding_scale, granite.residual_scale) == (12, 0.22)
    assert (granite.attention_scale, granite.logit_scale) == (1 / 64, 1 / 8)
    assert pythia.parallel == "two norms" and pythia.rope.rotated(pythia.head_size) == 16
    opt, falcon, roberta, qwen = map(model_config, (_OPT, _FALCON, _ROBERTA, _QWEN3_MOE))
    assert (opt.position_rows, opt.position_offset, opt.max_length) == (2050, 2, 2048)
    assert (falcon.key_head_count, falcon.parallel, falcon.feedforward_width) == (
        1,
        "one norm",
        4 * 4544,
    )
    assert (roberta.max_length, roberta.position_offset) == (512, 2)
    # Of 128 experts in each of 48 layers, 120 are not active.
    assert qwen.active_parameter_count == 30_532_122_624 - 48 * 120 * 3 * 2048 * 768
