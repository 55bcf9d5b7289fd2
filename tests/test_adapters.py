"""Adapters: W + scale * A @ B as a value, in PEFT's files, and in chains of directories."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hub_models import CONFIGS, random_model

from clustering.errors import UserError
from xelm.models.adapters import (
    Adapter,
    check_rank,
    chosen_targets,
    concatenated,
    merged,
)
from xelm.models.checkpoint import (
    check_checkpoint,
    family_of,
    load_model,
    load_parameters,
    read_chain_adapter,
    read_config,
    read_for_inference,
    write_adapted,
    write_whole,
)
from xelm.models.config import TARGETS
from xelm.models.families import FAMILIES
from xelm.models.layers import Linear
from xelm.models.parameters import by_path, for_inference, shapes
from xelm.models.peft import CONFIG, adapter_of, read_adapter
from xelm.models.stored import chain


def slow(name: str):
    return pytest.param(name, marks=pytest.mark.slow)


IDS = np.arange(3, 27).reshape(2, 12)


def saved(name: str, folder: Path) -> Path:
    model = random_model(CONFIGS[name])
    model.save_pretrained(folder)
    return folder


def random_adapter(config, paths, rank=3, scale=2.0, seed=0) -> Adapter:
    draw = np.random.default_rng(seed)
    there, factors = by_path(shapes(config)), {}
    for path in paths:
        layers, inputs, outputs = there[f"{path}/weight"].shape
        shape = (layers, inputs, rank), (layers, rank, outputs)
        factors[path] = tuple(0.2 * draw.normal(size=each).astype(np.float32) for each in shape)
    return Adapter(scale=scale, factors=factors)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved("llama-grouped", tmp_path_factory.mktemp("llama") / "seed")


def test_merged_weights_are_w_plus_scale_a_b(llama):
    config = read_config(llama)
    adapter = random_adapter(config, ["blocks/query", "blocks/down"])
    before = by_path(load_parameters(llama, config))
    after = by_path(merged(load_parameters(llama, config), adapter))
    for path, weight in before.items():
        wanted = np.asarray(weight, np.float64)
        if path.removesuffix("/weight") in adapter.factors:
            a, b = adapter.factors[path.removesuffix("/weight")]
            wanted = wanted + 2.0 * np.matmul(a.astype(np.float64), b.astype(np.float64))
            assert np.abs(wanted - np.asarray(weight)).max() > 0.1
        np.testing.assert_allclose(after[path], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("outputs_first", [False, True])
def test_an_adapted_layer_computes_what_its_merged_weight_does(outputs_first):
    layer = Linear(
        None, 4, 6, bias=True, scale=1.0, axes=("width", "ffn"), rngs=nnx.Rngs(0), dtype="float32"
    )
    weight, x = np.asarray(layer.weight[...]), np.random.default_rng(0).normal(size=(5, 4))
    a, b = (
        np.random.default_rng(1).normal(size=(4, 2)),
        np.random.default_rng(2).normal(size=(2, 6)),
    )
    layer.adapt(scale=0.5)
    layer.outputs_first = outputs_first
    turn = np.transpose if outputs_first else np.asarray
    layer.weight = nnx.Param(jnp.asarray(turn(weight)))
    layer.lora_a, layer.lora_b = (nnx.Param(jnp.float32(turn(each))) for each in (a, b))
    np.testing.assert_allclose(layer(jnp.float32(x)), x @ (weight + 0.5 * a @ b), atol=1e-5)


def test_two_adapters_are_one_of_the_summed_rank(llama):
    config = read_config(llama)
    parameters = load_parameters(llama, config)
    first = random_adapter(config, ["blocks/query", "blocks/up"], rank=2)
    second = random_adapter(config, ["blocks/query", "blocks/key"], rank=3, scale=0.5, seed=1)
    both = concatenated(first, second)
    assert both.factors["blocks/query"][0].shape[-1] == 5
    assert both.factors["blocks/key"][0].shape[-1] == 3
    one, other = merged(parameters, both), merged(merged(parameters, first), second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, other)


@pytest.mark.parametrize("name", ["gpt2", *(slow(name) for name in ("modernbert", "bloom"))])
def test_a_directory_with_an_adapter_reads_as_the_merged_model(name, tmp_path):
    base = saved(name, tmp_path / "seed")
    config = read_config(base)
    adapter = random_adapter(config, chosen_targets("q,v,up", config))
    write_adapted(tmp_path / "expert", base, adapter)
    found = load_parameters(tmp_path / "expert", check_checkpoint(tmp_path / "expert"))
    wanted = merged(load_parameters(base, config), adapter)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted)
    turned = read_for_inference(tmp_path / "expert", config)
    jax.tree.map(np.testing.assert_array_equal, turned, for_inference(found))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("name", list(CONFIGS))
def test_peft_loads_an_adapter_with_equal_logits(name, tmp_path):
    import peft

    base = saved(name, tmp_path / "seed")
    config = read_config(base)
    adapter = random_adapter(config, chosen_targets("all", config))
    write_adapted(tmp_path / "expert", base, adapter)
    adapted = peft.PeftModel.from_pretrained(
        random_model(CONFIGS[name]), str(tmp_path / "expert")
    ).eval()
    with torch.no_grad():
        logits = adapted(torch.from_numpy(IDS)).logits.numpy()
    found = np.asarray(load_model(tmp_path / "expert")(jnp.asarray(IDS)))
    plain = np.asarray(load_model(base)(jnp.asarray(IDS)))
    assert np.abs(plain - logits).max() > 0.01
    np.testing.assert_allclose(found, logits, atol=2e-4)
    kind = family_of(base)
    again = read_adapter(tmp_path / "expert", config, kind)
    one, other = (merged(load_parameters(base, config), each) for each in (again, adapter))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, other)


def test_a_chain_of_directories_is_one_adapter_of_the_first(llama, tmp_path):
    config = read_config(llama)
    first = random_adapter(config, ["blocks/query", "blocks/up"], rank=2)
    second = random_adapter(config, ["blocks/query", "blocks/key"], scale=0.5, seed=1)
    write_adapted(tmp_path / "de" / "v1", llama, first)
    write_adapted(tmp_path / "nl" / "v1", tmp_path / "de" / "v1", second)
    assert chain(tmp_path / "nl" / "v1")[1:] == [tmp_path / "de" / "v1", llama]
    one = adapter_of(read_chain_adapter(tmp_path / "nl" / "v1"), config, FAMILIES["llama"])
    wanted = concatenated(first, second)
    for path, pair in wanted.factors.items():
        jax.tree.map(np.testing.assert_array_equal, one.factors[path], pair)
    found = load_parameters(tmp_path / "nl" / "v1", config)
    other = merged(load_parameters(llama, config), wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, other)
    write_whole(tmp_path / "nl" / "v1", tmp_path / "whole")
    whole = load_parameters(tmp_path / "whole", config)
    jax.tree.map(np.testing.assert_array_equal, whole, found)


def test_a_second_factor_of_zeros_changes_no_bit(llama, tmp_path):
    config = read_config(llama)
    adapter = random_adapter(config, TARGETS.values())
    zeros = {path: (a, np.zeros_like(b)) for path, (a, b) in adapter.factors.items()}
    write_adapted(tmp_path / "expert", llama, Adapter(scale=2.0, factors=zeros))
    before, after = load_parameters(llama, config), load_parameters(tmp_path / "expert", config)
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora must not be set"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config must not be set"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', by which"),
        ({"init_lora_weights": "olora"}, "PEFT changes the weights of the base too"),
        ({"bias": "all"}, "bias must be none; got all"),
        ({"peft_type": "IA3"}, "peft_type must be LORA; got IA3"),
        ({"lora_alpha": "many"}, "lora_alpha must be a number"),
        ({"alpha_pattern": {".*q_proj": 2}}, "numbers by name of module"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(llama, tmp_path, changes, message):
    config = read_config(llama)
    write_adapted(tmp_path / "expert", llama, random_adapter(config, ["blocks/query"]))
    path = tmp_path / "expert" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=re.escape(message)):
        load_parameters(tmp_path / "expert", config)


@pytest.mark.parametrize("initial", [True, False, "gaussian", "orthogonal", "eva"])
def test_an_adapter_may_begin_with_any_factors_beside_the_same_base(llama, tmp_path, initial):
    config = read_config(llama)
    write_adapted(tmp_path / "expert", llama, random_adapter(config, ["blocks/query"]))
    before = load_parameters(tmp_path / "expert", config)
    path = tmp_path / "expert" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": initial}))
    after = load_parameters(tmp_path / "expert", config)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_an_adapter_of_another_shape_is_refused(llama, tmp_path):
    config = read_config(llama)
    adapter = random_adapter(config, ["blocks/query"])
    narrow = {path: (a[:, :-1], b) for path, (a, b) in adapter.factors.items()}
    write_adapted(tmp_path / "expert", llama, Adapter(scale=1.0, factors=narrow))
    with pytest.raises(UserError, match=r"q_proj by a matrix of \(48, 31\); that of its base has"):
        load_parameters(tmp_path / "expert", config)


def test_targets_and_ranks_that_a_model_does_not_have_are_refused(llama):
    config = read_config(llama)
    assert chosen_targets("v, q", config) == ("blocks/value", "blocks/query")
    with pytest.raises(
        UserError, match="some of q, k, v, o, gate, up, down for this model; got 'x'"
    ):
        chosen_targets("q,x", config)
    check_rank(24, ["blocks/key"], config)
    with pytest.raises(UserError, match="at most 24, the smaller dimension of blocks/key; got 25"):
        check_rank(25, ["blocks/key"], config)
