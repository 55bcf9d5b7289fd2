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


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (_SMOLLM3, 3_075_098_624),
        (_OLMO2, 7_298_617_344),
        (_APERTUS, 8_053_338_176),
        (_AYA, 8_028_033_024),
        (_COMMAND, 8_028_033_024),
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
