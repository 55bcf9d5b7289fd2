"""The decoder against transformers on tiny random models, both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, XGLMConfig

from xelm.models.checkpoint import (
    load_model,
    parameters_of,
    read_config,
    read_parameters,
    save_model,
)
from xelm.models.decoder import empty_cache

LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
}
CASES = {
    "llama-grouped": LlamaConfig(**LLAMA),
    "llama-one-key-head-tied": LlamaConfig(
        **{**LLAMA, "num_key_value_heads": 1},
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    ),
    "llama-all-heads-biased": LlamaConfig(
        **{**LLAMA, "num_key_value_heads": 4},
        attention_bias=True,
        mlp_bias=True,
        rms_norm_eps=1e-5,
    ),
    "xglm": XGLMConfig(
        vocab_size=101,
        d_model=36,
        ffn_dim=60,
        num_layers=2,
        attention_heads=3,
        max_position_embeddings=256,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    "xglm-unscaled": XGLMConfig(
        vocab_size=64,
        d_model=32,
        ffn_dim=40,
        num_layers=2,
        attention_heads=2,
        max_position_embeddings=256,
        scale_embedding=False,
        dropout=0.0,
        attention_dropout=0.0,
    ),
}


@pytest.fixture(params=CASES, scope="module")
def pair(request, tmp_path_factory):
    """A random transformers model with nothing at its initial zero or one, and its directory."""
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(CASES[request.param]).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp(request.param) / "hub"
    reference.save_pretrained(directory)
    return reference, directory


def random_tokens(vocabulary_size, shape):
    return np.random.default_rng(0).integers(0, vocabulary_size, shape)


@pytest.mark.parametrize("length", [1, 7, 150])
def test_logits_equal_transformers(pair, length):
    reference, directory = pair
    tokens = random_tokens(reference.config.vocab_size, (2, length))
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens)).logits.numpy()
    logits = load_model(directory)(jnp.asarray(tokens))
    np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_equal_transformers(pair, side):
    reference, directory = pair
    tokens = random_tokens(reference.config.vocab_size, (2, 11))
    mask = np.ones((2, 11), int)
    mask[1, slice(0, 4) if side == "left" else slice(7, None)] = 0
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
    logits = np.asarray(load_model(directory)(jnp.asarray(tokens), jnp.asarray(mask)))
    seen = mask.astype(bool)
    np.testing.assert_allclose(logits[seen], wanted[seen], atol=1e-4, rtol=1e-4)


def test_cached_states_equal_uncached(pair):
    _, directory = pair
    model = load_model(directory)
    tokens = jnp.asarray(random_tokens(model.config.vocabulary_size, (2, 20)))
    # The second sequence is shorter: five pads on the left.
    valid = jnp.asarray(np.array([[1] * 20, [0] * 5 + [1] * 15], bool))
    cache = empty_cache(model.config, 2, 24, jnp.float32)
    parts = []
    for start, end in ((0, 9), (9, 10), (10, 20)):
        states, cache = model.extend(tokens[:, start:end], cache, valid=valid[:, start:end])
        parts.append(states)
    cached = jnp.concatenate(parts, axis=1)
    whole, short = model.hidden(tokens[:1]), model.hidden(tokens[1:, 5:])
    np.testing.assert_allclose(cached[0], whole[0], atol=2e-5)
    np.testing.assert_allclose(cached[1, 5:], short[0], atol=2e-5)


def test_segments_do_not_see_each_other(pair):
    _, directory = pair
    model = load_model(directory)
    tokens = jnp.asarray(random_tokens(model.config.vocabulary_size, (1, 90)))
    segments = jnp.asarray([[1] * 40 + [2] * 50])
    positions = jnp.asarray([[*range(40), *range(50)]])
    packed = model.hidden(tokens, positions=positions, segments=segments)
    np.testing.assert_allclose(packed[0, :40], model.hidden(tokens[:, :40])[0], atol=2e-5)
    np.testing.assert_allclose(packed[0, 40:], model.hidden(tokens[:, 40:])[0], atol=2e-5)


def test_round_trip_keeps_every_bit_and_the_config(pair, tmp_path):
    reference, directory = pair
    model = load_model(directory)
    save_model(model, tmp_path / "out", like=directory)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, parameter in reference.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name]), name
    before = json.loads((directory / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert before == after


def test_fresh_config_is_read_back(pair, tmp_path):
    _, directory = pair
    model = load_model(directory)
    from xelm.models.checkpoint import write_checkpoint

    kind = json.loads((directory / "config.json").read_text())["model_type"]
    write_checkpoint(tmp_path / "out", model.config, parameters_of(model), model_type=kind)
    assert read_config(tmp_path / "out") == model.config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = random_tokens(model.config.vocabulary_size, (1, 9))
    with torch.no_grad():
        wanted = loaded(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model(jnp.asarray(tokens)), wanted, atol=1e-4, rtol=1e-4)


def test_parameter_count_is_the_number_of_values(pair):
    reference, directory = pair
    config = read_config(directory)
    assert config.parameter_count == sum(p.numel() for p in reference.parameters())
    leaves = jax.tree.leaves(read_parameters(directory, config))
    assert config.parameter_count == sum(leaf.size for leaf in leaves)


def test_bfloat16_parameters_are_the_rounded_ones(pair):
    _, directory = pair
    exact = parameters_of(load_model(directory))
    rounded = parameters_of(load_model(directory, dtype="bfloat16"))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a, jnp.bfloat16), b), exact, rounded
    )
