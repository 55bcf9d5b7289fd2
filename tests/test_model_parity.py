"""The transformer against transformers on tiny random models of every family, both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hub_models import (
    CONFIGS,
    DECODERS,
    FAMILIES,
    auto_model,
    by_speed,
    gradients_of,
    once,
    random_tokens,
    saved,
)
from safetensors.numpy import load_file
from small_training import MODEL

from xelm.models.cache import empty_cache
from xelm.models.checkpoint import (
    load_model,
    load_parameters,
    read_config,
    read_for_inference,
    save_model,
    write_checkpoint,
)
from xelm.models.layers import Linear
from xelm.models.parameters import bind, for_inference, graph, inference_graph, parameters_of
from xelm.training.loss import cross_entropy

# Compiled whole: operation by operation takes several times as long.
logits_of = nnx.jit(lambda model, *inputs: model(*inputs))
hidden_of = nnx.jit(lambda model, tokens, **options: model.hidden(tokens, **options))
means_of = nnx.jit(lambda model, tokens, valid: model.means(tokens, valid=valid))
extended = nnx.jit(lambda model, *inputs: model.extend(*inputs))
# Longer than every local window and than the lengths that rotary positions are stretched from.
LENGTH = 40
# Long enough for causal attention to go block by block, and no whole number of blocks.
IN_BLOCKS = 150


def as_for_inference(model):
    """The model in the layout of inference."""
    return bind(inference_graph(model.config), for_inference(parameters_of(model)))


@pytest.fixture(params=once(list(CONFIGS)), scope="module")
def pair(request, tmp_path_factory):
    return saved(CONFIGS[request.param], tmp_path_factory.mktemp(request.param) / "hub")


@pytest.fixture(params=by_speed(FAMILIES), scope="module")
def family_pair(request, tmp_path_factory):
    return saved(CONFIGS[request.param], tmp_path_factory.mktemp(request.param) / "hub")


@pytest.fixture(params=by_speed([n for n in FAMILIES if n in DECODERS]), scope="module")
def decoder_pair(request, tmp_path_factory):
    return saved(CONFIGS[request.param], tmp_path_factory.mktemp(request.param) / "hub")


def padded_tokens(config, length=LENGTH):
    """Ids [3, T] with their mask: whole, padded on the left, padded on the right."""
    tokens, mask = random_tokens((3, length)), np.ones((3, length), int)
    mask[1, :13], mask[2, -11:] = 0, 0
    # XLM-R counts positions by the padding's id, wherever the mask is.
    tokens[mask == 0] = config.pad_token_id or 0
    return tokens, mask


def reference_logits(reference, tokens, mask=None):
    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        return reference(torch.tensor(tokens), attention_mask=mask).logits.numpy()


def test_logits_equal_transformers(pair):
    tokens, mask = padded_tokens(pair.reference.config, IN_BLOCKS)
    wanted = reference_logits(pair.reference, tokens, mask)
    logits = np.asarray(logits_of(load_model(pair.directory), tokens, mask))
    seen = mask.astype(bool)
    np.testing.assert_allclose(logits[seen], wanted[seen], atol=1e-4, rtol=1e-4)


def test_means_of_states_equal_transformers(family_pair):
    tokens, mask = (part[[0, 2]] for part in padded_tokens(family_pair.reference.config))
    with torch.no_grad():
        asked = {"attention_mask": torch.tensor(mask), "output_hidden_states": True}
        states = family_pair.reference(torch.tensor(tokens), **asked).hidden_states[1:]
    shares = (mask / mask.sum(axis=1, keepdims=True))[:, :, None]
    wanted = np.stack([(layer.numpy() * shares).sum(axis=1) for layer in states])
    found = means_of(load_model(family_pair.directory), tokens, valid=mask.astype(bool))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_loss_and_gradients_equal_transformers(family_pair):
    reference, directory = family_pair.reference, family_pair.directory
    tokens, chosen = random_tokens((2, 21)), np.arange(21) % 3 == 1
    given = tokens.copy()
    if family_pair.masked:
        given[:, chosen] = 3
        labels = np.where(chosen, tokens, -100)
    else:
        labels = tokens
    reference.zero_grad()
    found = reference(torch.tensor(given), labels=torch.tensor(labels))
    found.loss.backward()

    config = read_config(directory)
    shape = graph(config)

    def loss(parameters):
        network = bind(shape, parameters)
        hidden = network.hidden(jnp.asarray(given))
        targets, weights = jnp.asarray(tokens), jnp.asarray(labels != -100, jnp.float32)
        if config.causal:
            hidden, targets, weights = hidden[:, :-1], targets[:, 1:], weights[:, 1:]
        return cross_entropy(*network.output(hidden), targets, weights) / weights.sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(load_parameters(directory, config))
    np.testing.assert_allclose(value, float(found.loss.detach()), rtol=1e-5)
    # Written as a checkpoint, they have the names of the reference's parameters.
    write_checkpoint(directory.parent / "gradients", config, gradients, like=directory)
    stored = load_file(directory.parent / "gradients" / "model.safetensors")
    stored = {name: values for name, values in stored.items() if values.ndim}  # no constants
    named = gradients_of(reference)
    assert sum(gradient.size for gradient in stored.values()) == reference.num_parameters()
    for name, gradient in stored.items():
        np.testing.assert_allclose(gradient, named[name], atol=1e-4, rtol=1e-4, err_msg=name)


def test_bfloat16_products_stay_near_float32(family_pair):
    """bf16 keeps eight bits: an error of a few hundredths of the logits' spread."""
    tokens = random_tokens((2, LENGTH))
    exact = reference_logits(family_pair.reference, tokens)
    rough = logits_of(load_model(family_pair.directory, dtype="bfloat16"), tokens)
    assert rough.dtype == jnp.float32
    error = np.abs(np.asarray(rough) - exact)
    assert error.mean() < 0.02 * np.std(exact)
    assert error.max() < 0.15 * np.std(exact)


def test_cached_states_equal_uncached(decoder_pair):
    """Two texts are read in pieces of unequal length. The cache has no space for what follows the
    second text in the last piece."""
    model = load_model(decoder_pair.directory)
    network = as_for_inference(model)
    texts = random_tokens((2, 20))
    cache, begun = empty_cache(model.config, 2, 20, jnp.float32), np.zeros(2, int)
    whole = np.asarray(hidden_of(model, jnp.asarray(texts)))
    for counts in ((5, 1), (0, 5), (5, 5), (1, 5), (5, 0), (4, 4)):
        tokens = random_tokens((2, 5), seed=7)  # what is not of the text is anything
        for row, count in enumerate(counts):
            tokens[row, :count] = texts[row, begun[row] : begun[row] + count]
        states, cache = extended(network, jnp.asarray(tokens), jnp.asarray(counts), cache)
        for row, count in enumerate(counts):
            wanted = whole[row, begun[row] : begun[row] + count]
            np.testing.assert_allclose(states[row, :count], wanted, atol=2e-5)
        begun += counts
    assert begun.tolist() == [20, 20] and cache.length.tolist() == [20, 20]


def assert_the_same_for_inference(pair, shape):
    model = load_model(pair.directory)
    network = as_for_inference(model)
    tokens = jnp.asarray(random_tokens(shape))
    found = logits_of(network, tokens)
    np.testing.assert_allclose(found, logits_of(model, tokens), atol=1e-4)


def test_the_layout_of_inference_changes_nothing(family_pair):
    stacked = load_parameters(family_pair.directory, read_config(family_pair.directory))
    apart = read_for_inference(family_pair.directory, read_config(family_pair.directory))
    jax.tree.map(np.testing.assert_array_equal, for_inference(stacked), apart)
    assert_the_same_for_inference(family_pair, (2, 9))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(5, 20), (1, 1)])
@pytest.mark.parametrize("name", ["llama3", "mixtral", "qwen3_moe", "gpt2", "modernbert"])
def test_more_and_fewer_rows_than_products_turn_for_give_the_same(name, shape, tmp_path):
    """Of layers with a gate, with a router, without, and of an encoder."""
    assert_the_same_for_inference(saved(CONFIGS[name], tmp_path / "hub"), shape)


def test_the_order_within_a_feed_forward_is_that_of_recorded_trainings(parameters, monkeypatch):
    """The gradient by its input is summed in the order of uses: another order, other bits."""
    network = bind(inference_graph(MODEL), for_inference(jax.tree.map(jnp.asarray, parameters)))
    block, called, compute = network.blocks[0], [], Linear.__call__
    names = {id(getattr(block, name)): name for name in ("gate", "up", "down")}

    def recorded(self, h):
        called.append(names.get(id(self)))
        return compute(self, h)

    monkeypatch.setattr(Linear, "__call__", recorded)
    network.hidden(jnp.asarray(random_tokens((1, 4)) % MODEL.vocabulary_size))
    assert [name for name in called if name] == ["gate", "up", "down"]


def test_segments_do_not_see_each_other(family_pair):
    """A text has the same states before another one and after a third."""
    text, before, after = np.split(random_tokens((1, 135)), 3, axis=1)
    rows = [np.concatenate(row, axis=1) for row in ((text, after), (before, text))]
    segments = np.repeat([[1, 2]], 45, axis=1).repeat(2, axis=0)
    positions = np.tile(np.arange(45), 2)[None].repeat(2, axis=0)
    packed = hidden_of(
        load_model(family_pair.directory),
        jnp.asarray(np.concatenate(rows)),
        positions=jnp.asarray(positions),
        segments=jnp.asarray(segments),
    )
    np.testing.assert_allclose(packed[0, :45], packed[1, 45:], atol=2e-5)


def test_round_trip_keeps_every_bit_and_the_config(pair, tmp_path):
    """Without a word of what the model was: it remembers the checkpoint it was loaded from."""
    save_model(load_model(pair.directory), tmp_path / "out")
    again = auto_model(tmp_path / "out")
    assert type(again) is type(pair.reference)
    for name, parameter in pair.reference.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name]), name
    before = json.loads((pair.directory / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert before == after


@pytest.mark.parametrize("name", ["llama-grouped", "llama3", "llama-linear", "xglm-unscaled"])
def test_fresh_config_is_read_back(name, tmp_path):
    pair = saved(CONFIGS[name], tmp_path / "hub")
    model = load_model(pair.directory)
    kind = pair.reference.config.model_type
    write_checkpoint(tmp_path / "out", model.config, parameters_of(model), model_type=kind)
    assert read_config(tmp_path / "out") == model.config
    loaded = auto_model(tmp_path / "out")
    tokens = random_tokens((1, 9))
    wanted = reference_logits(loaded, tokens)
    np.testing.assert_allclose(logits_of(model, tokens), wanted, atol=1e-4, rtol=1e-4)


def test_parameter_count_is_the_number_of_values(pair):
    config = read_config(pair.directory)
    assert config.parameter_count == sum(p.numel() for p in pair.reference.parameters())


def test_bfloat16_parameters_are_the_rounded_ones(tmp_path):
    directory = saved(CONFIGS["llama-grouped"], tmp_path / "hub").directory
    exact = parameters_of(load_model(directory))
    rounded = parameters_of(load_model(directory, dtype="bfloat16"))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a, jnp.bfloat16), b), exact, rounded
    )
