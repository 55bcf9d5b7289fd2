"""Weights in int8 and bfloat16: what is stored, what products give, and what takes how much."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustering.errors import UserError
from xelm.inference.decoder import Decoder
from xelm.inference.parameter_cache import Overlay, ParameterCache
from xelm.models import products
from xelm.models.checkpoint import inference_dtype
from xelm.models.config import ModelConfig
from xelm.models.narrow import (
    Int8Matrix,
    compute_dtype,
    is_matrix,
    narrowed,
    quantised,
    stored_as,
    whole,
)
from xelm.models.parameters import (
    bind,
    by_path,
    for_inference,
    fresh_parameters,
    inference_bytes,
    inference_graph,
)

SHAPES = {
    "decoder": {},
    "tied": {"tie_embeddings": True},
    "untied": {"tie_embeddings": False, "head_bias": True, "feedforward_bias": True},
    "experts": {"expert_count": 3, "experts_per_token": 2},
    "encoder": {
        "causal": False,
        "norm": "layer",
        "norm_bias": True,
        "head_transform": True,
        "head_transform_bias": True,
        "positions": "learned",
        "gated": False,
        "activation": "gelu",
        "token_types": 2,
    },
}


def shape_of(name):
    return ModelConfig(
        vocabulary_size=96,
        width=64,
        feedforward_width=96,
        layer_count=2,
        head_count=4,
        key_head_count=2,
        head_size=16,
        max_length=64,
        **SHAPES[name],
    )


def wide(model, seed=0):
    """Parameters of a model whose predictions differ from token to token."""
    fresh = fresh_parameters(model, seed)
    return jax.tree.map(np.asarray, for_inference(jax.tree.map(lambda p: 3 * p, fresh)))


def ordinary(tree):
    """The same parameters with ordinary numbers in the place of narrow ones."""

    def is_leaf(leaf):
        return isinstance(leaf, Int8Matrix)

    return jax.tree.map(lambda leaf: np.asarray(whole(leaf), np.float32), tree, is_leaf=is_leaf)


@partial(jax.jit, static_argnums=0)
def logits(model, parameters, tokens):
    return bind(inference_graph(model), parameters)(tokens)


@pytest.mark.parametrize("shape", [(7, 5), (300, 64)])
def test_quantised_weights_are_within_half_a_step_of_the_originals(shape):
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    matrix[2], matrix[3, 1:] = 0, 0
    found = quantised(matrix)
    assert found.values.dtype == np.int8 and found.scale.dtype == np.float32
    steps = np.abs(matrix).max(axis=1) / 127
    np.testing.assert_allclose(found.scale, np.where(steps > 0, steps, 1), rtol=1e-6)
    assert (np.abs(whole(found) - matrix) <= steps[:, None] * 0.5001).all()
    assert (np.abs(found.values).max(axis=1) == np.where(steps > 0, 127, 0)).all()
    assert whole(found)[3, 0] == pytest.approx(matrix[3, 0]) and not whole(found)[2].any()


def test_norms_biases_and_routers_stay_in_float32():
    found = by_path(stored_as(wide(shape_of("encoder")), "int8")["blocks"][0])
    kept = [path for path, leaf in found.items() if not isinstance(leaf, Int8Matrix)]
    assert kept and not any(is_matrix(path) for path in kept)
    assert all(found[path].dtype == np.float32 for path in kept)
    mixture = stored_as(wide(shape_of("experts")), "int8")
    assert mixture["blocks"][0]["router"]["weight"].dtype == np.float32
    assert isinstance(mixture["blocks"][0]["expert_2"]["down"]["weight"], Int8Matrix)
    assert isinstance(mixture["embedding"], Int8Matrix)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 5, 32, 33, 70])
def test_products_are_those_of_the_dequantised_weights(dtype, rows, monkeypatch):
    monkeypatch.setattr(products, "_PART", 2**12)  # several parts, of which the last is shorter
    draw = np.random.default_rng(rows)
    matrix = draw.standard_normal((130, 48)).astype(np.float32)
    x = draw.standard_normal((rows, 48)).astype(np.float32) * np.logspace(-3, 3, rows)[:, None]
    x = np.concatenate([x[:-1], np.zeros_like(x[-1:])]) if rows > 2 else x
    narrow = narrowed("head", matrix, dtype)
    compiled = jax.jit(products.by_rows_of)
    found = compiled(jnp.asarray(x, jnp.float32), jax.device_put(narrow))
    weights = np.asarray(whole(narrow), np.float64)
    wanted = x @ weights.T
    assert found.shape == wanted.shape and found.dtype == jnp.float32
    # The parts of a state: by int8 to 1 / (4 * 127^2) of the largest, by bfloat16 to 2^-17 of it.
    steps = np.abs(x).max(axis=1, keepdims=True) / (4 * 127**2) + 0 * x
    steps = np.abs(x) * 2.0**-17 if dtype == "bfloat16" else steps
    rounding = np.abs(x) * 48 * 2.0**-24
    assert (np.abs(found - wanted) <= (steps + rounding) @ np.abs(weights).T).all()


def test_the_library_computes_the_products_of_few_rows():
    assert products.has_library()
    narrow = jax.device_put(quantised(np.ones((128, 64), np.float32)))
    compiled = jax.jit(products.by_rows_of).lower(jnp.ones((1, 64)), narrow).compile()
    assert "ynn_fusion" in compiled.as_text()


def test_products_are_the_same_without_the_library(monkeypatch):
    draw = np.random.default_rng(0)
    narrow = jax.device_put(quantised(draw.standard_normal((70, 48)).astype(np.float32)))
    x = jnp.asarray(draw.standard_normal((1, 48)), jnp.float32)
    wanted = products.by_rows_of(x, narrow)
    monkeypatch.setattr(products, "has_library", lambda: False)
    found = jax.jit(lambda x, matrix: products.by_rows_of(x, matrix))(x, narrow)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_weights_give_the_logits_of_the_rounded_weights(name):
    model = shape_of(name)
    tokens = np.random.default_rng(0).integers(4, 96, (2, 20))
    narrow = stored_as(wide(model), "bfloat16")
    assert narrow["embedding"].dtype == jnp.bfloat16
    found = np.asarray(logits(model, narrow, tokens))
    wanted = np.asarray(logits(model, ordinary(narrow), tokens))
    assert np.abs(found - wanted).max() < 1e-4 * wanted.std()


@pytest.mark.parametrize("name", SHAPES)
def test_int8_weights_give_the_logits_of_the_dequantised_weights(name):
    model = shape_of(name)
    tokens = np.random.default_rng(0).integers(4, 96, (1, 20))
    exact = wide(model)
    narrow = stored_as(exact, "int8")
    found = np.asarray(logits(model, narrow, tokens))
    wanted = np.asarray(logits(model, ordinary(narrow), tokens))
    spread = wanted.std()
    assert np.abs(found - wanted).max() < 1e-3 * spread
    # What rounding the weights changes: a stated bound, and no less than nothing.
    error = np.abs(found - np.asarray(logits(model, exact, tokens)))
    assert 1e-4 * spread < error.mean() < 0.05 * spread


def test_few_tokens_and_many_are_read_alike_in_int8():
    model = shape_of("tied")
    parameters = jax.device_put(stored_as(wide(model), "int8"))
    ids = np.random.default_rng(1).integers(4, 96, 50).tolist()
    decoder = Decoder(model, lambda: parameters, "int8")
    once, by_token = decoder.open(ids, scored=True), decoder.open(ids, scored=True)
    decoder.read({once: ids}, scored=True)
    for token in ids:
        decoder.read({by_token: [token]}, scored=True)
    assert once.scores is not None and by_token.scores is not None
    np.testing.assert_allclose(by_token.scores[1:], once.scores[1:], atol=2e-3)


def test_parameters_take_a_quarter_of_the_bytes_and_four_times_the_experts_fit():
    model = ModelConfig(
        vocabulary_size=4000,
        width=256,
        feedforward_width=512,
        layer_count=2,
        head_count=4,
        key_head_count=4,
        head_size=64,
        max_length=64,
    )
    exact = wide(model)
    size = {d: inference_bytes(model, d) for d in ("float32", "bfloat16", "int8")}
    for dtype, wanted in size.items():
        found = sum(leaf.nbytes for leaf in jax.tree.leaves(stored_as(exact, dtype)))
        assert found == wanted, dtype
    assert size["float32"] / size["bfloat16"] > 1.99 and size["float32"] / size["int8"] > 3.9
    budget = 2.1 * size["float32"]
    for dtype, count in (("float32", 2), ("bfloat16", 4), ("int8", 8)):
        loaders = [lambda dtype=dtype: stored_as(exact, dtype)] * 10
        cache = ParameterCache(loaders, device_bytes=budget, host_bytes=0)
        for number in range(10):
            cache[number]
        assert len(cache.on_device) == count, dtype


def test_adapters_stand_beside_a_base_in_int8():
    model = shape_of("tied")
    exact, draw = wide(model), np.random.default_rng(3)
    factors = {
        "lora_a": draw.standard_normal((4, 64)).astype(np.float32),
        "lora_b": draw.standard_normal((64, 4)).astype(np.float32),
    }
    part = {"blocks": tuple({"query": factors} for _ in range(2))}
    base = stored_as(exact, "int8")
    cache = ParameterCache([Overlay(base_name="base", base=lambda: base, part=lambda: part)])
    merged = ordinary(base)
    for block in merged["blocks"]:
        block["query"]["weight"] = block["query"]["weight"] + factors["lora_b"] @ factors["lora_a"]
    tokens = np.random.default_rng(0).integers(4, 96, (2, 20))
    decoder = Decoder(model, lambda: cache[0], "int8")
    texts = [decoder.open(ids) for ids in tokens.tolist()]
    decoder.read(dict(zip(texts, tokens.tolist())))
    wanted = np.asarray(logits(model, merged, tokens))
    for text, row in zip(texts, wanted):
        found = text.block.logits[text.index]
        np.testing.assert_allclose(found, row[-1], atol=2e-3 * wanted.std())


def test_dtypes_are_chosen_by_platform_and_unknown_ones_are_refused(tmp_path):
    assert [compute_dtype(d, "cpu") for d in ("float32", "bfloat16", "int8")] == ["float32"] * 3
    found = [compute_dtype(d, "gpu") for d in ("float32", "bfloat16", "int8")]
    assert found == ["float32", "bfloat16", "bfloat16"]
    with pytest.raises(UserError, match="dtype must be auto or one of float32, bfloat16, int8"):
        inference_dtype(tmp_path, "int4")
