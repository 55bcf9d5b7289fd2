"""Experts that store a difference share the arrays of their base in memory."""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_training import MODEL, TEXT

from xelm.inference.decoder import Decoder
from xelm.inference.parameter_cache import Overlay, ParameterCache
from xelm.inference.scoring import score_documents
from xelm.models.adapters import Adapter
from xelm.models.checkpoint import read_for_inference, write_adapted, write_checkpoint
from xelm.models.difference import compressed, difference, store, write_difference
from xelm.models.parameters import NEW_ROWS, by_path, shapes
from xelm.models.shared import overlaid, read_part
from xelm.models.vocabulary_rows import new_rows, resized

WEIGHTS = "model.safetensors"
ADAPTERS = 3
KINDS = ("adapter 0", "low rank", "frozen", "second", "on frozen")


def tuned(base, folder, draw, changed=lambda name: True):
    shutil.copytree(base, folder)
    tensors = load_file(folder / WEIGHTS)
    for name, values in tensors.items():
        if changed(name):
            tensors[name] = values + 0.1 * draw.normal(size=values.shape).astype(np.float32)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def adapter(draw, rank):
    factors = {}
    for path in ("blocks/query", "blocks/down"):
        layers, inputs, outputs = by_path(shapes(MODEL))[f"{path}/weight"].shape
        sizes = (layers, inputs, rank), (layers, rank, outputs)
        factors[path] = tuple(0.3 * draw.normal(size=size).astype(np.float32) for size in sizes)
    return Adapter(scale=2.0, factors=factors)


@pytest.fixture(scope="module")
def models(parameters, tmp_path_factory):
    """Directories by kind: a base, and what stores differences to it."""
    folder, draw = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    base = folder / "base"
    write_checkpoint(base, MODEL, parameters)
    whole = tuned(base, folder / "whole", draw)
    found = compressed(difference(whole, base), whole, rank=3, energy=None)
    write_difference(folder / "low rank", found, "float32")
    frozen = tuned(base, folder / "frozen whole", draw, lambda name: "layers.1.mlp" in name)
    store(frozen, base, folder / "frozen")
    for number in range(ADAPTERS):
        write_adapted(folder / f"adapter {number}", base, adapter(draw, 2))
    # An adapter of an adapter, of another rank, and one of a model with replaced tensors.
    write_adapted(folder / "second", folder / "adapter 0", adapter(draw, 1))
    write_adapted(folder / "on frozen", folder / "frozen", adapter(draw, 1))
    return folder


def both(models, name):
    """Parameters of a model as factors beside its base, and merged."""
    base = read_for_inference(models / "base", MODEL)
    return (
        overlaid(base, read_part(models / name, MODEL)),
        read_for_inference(models / name, MODEL),
    )


@pytest.mark.parametrize("name", KINDS)
def test_the_products_of_factors_are_the_differences_of_the_merged_weights(models, name):
    apart, merged = both(models, name)
    found = {n: value for n, value in apart.items() if n != "embedding_factors"}
    if "embedding_factors" in apart:
        found["embedding"] = found["embedding"] + np.matmul(
            apart["embedding_factors"]["b"], apart["embedding_factors"]["a"]
        )
    found["blocks"] = tuple(
        {layer: product(values) for layer, values in block.items()} for block in apart["blocks"]
    )
    assert jax.tree.structure(found) == jax.tree.structure(merged)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(merged)):
        np.testing.assert_allclose(one, other, atol=1e-6)


def product(values):
    if "lora_a" not in values:
        return values
    return {"weight": values["weight"] + values["lora_b"] @ values["lora_a"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_factors_beside_the_base_give_the_log_probabilities_of_the_merged_weights(models, name):
    documents = [np.asarray(ids) for ids in ([5, 9, 3, 17, 40], [11, 4] * 8)]
    reading = {"text_format": TEXT, "context_length": MODEL.max_length}
    base = read_for_inference(models / "base", MODEL)
    apart, merged = both(models, name)
    found, wanted, others = (
        np.concatenate(score_documents(MODEL, each, documents, **reading))
        for each in (apart, merged, base)
    )
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert np.abs(wanted - others).max() > 0.02


def test_token_by_token_the_factors_give_the_logits_of_the_merged_weights(models):
    logits = []
    for each in both(models, "low rank"):
        decoder = Decoder(MODEL, lambda each=each: each)
        text = decoder.open([5, 9, 3, 17, 4])
        for ids in ([5, 9, 3], [17], [4]):
            decoder.read({text: ids})
        logits.append(np.asarray(text.block.logits[text.index]))
    np.testing.assert_allclose(*logits, atol=2e-5)


@pytest.mark.parametrize("name", ["low rank", "adapter 0", "frozen"])
def test_in_pieces_of_another_expert_the_factors_give_the_logits_of_the_merged_weights(
    models, name
):
    expansions, apart_and_merged = [[3, 4], [5, 6, 7]], both(models, name)
    known = MODEL.vocabulary_size
    wider, merged = resized(MODEL, known + 2), apart_and_merged[1]
    rows = new_rows(np.asarray(merged["embedding"]), known, known + 2, expansions)
    logits = []
    for each in apart_and_merged:
        decoder = Decoder(wider, lambda each=each: {**each, NEW_ROWS: rows})
        text = decoder.open([5, known, 3, known + 1, 4])
        for ids in ([5, known, 3], [known + 1], [4]):
            decoder.read({text: ids})
        logits.append(np.asarray(text.block.logits[text.index]))
    assert (logits[0][known:] == -np.inf).all() and np.isfinite(logits[0][:known]).all()
    np.testing.assert_allclose(*logits, atol=2e-5)


def size(tree):
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))


def on_device(cache):
    """Bytes of the distinct arrays that a cache has given out."""
    leaves = [leaf for number in range(len(cache)) for leaf in jax.tree.leaves(cache[number])]
    return sum({id(leaf): leaf.nbytes for leaf in leaves}.values())


def overlays(models, names, loaded, **budget):
    def load(name, read):
        loaded.append(name)
        return read(models / name, MODEL)

    loaders = [
        Overlay(
            base_name="base",
            base=lambda: load("base", read_for_inference),
            part=lambda name=name: load(name, read_part),
        )
        for name in names
    ]
    return ParameterCache(loaders, names=names, **budget)


def test_many_adapters_cost_one_base_and_their_factors(models):
    loaded, names = [], [f"adapter {number}" for number in range(ADAPTERS)]
    cache = overlays(models, names, loaded)
    base = size(read_for_inference(models / "base", MODEL))
    factors = [size(read_part(models / name, MODEL)) for name in names]
    # query [16, 16] and down [24, 16] of two layers, rank 2, float32.
    assert factors == [4 * 2 * 2 * (16 + 16 + 24 + 16)] * ADAPTERS
    assert on_device(cache) == base + sum(factors)
    assert cache[0]["embedding"] is cache[2]["embedding"]
    assert cache[1] is cache[1]
    assert loaded == ["base", *names]
    # All but the part that is used leaves a device that is too small, and the base with it.
    small = overlays(models, names, loaded, device_bytes=base + factors[0], host_bytes=2 * base)
    for number in (0, 1, 0, 2):
        same = jax.tree.map(np.array_equal, small[number], cache[number])
        assert all(jax.tree.leaves(same))
        assert small.on_device == ("base", names[number])
    assert small.on_host == (names[1], names[0])
    assert loaded.count("base") == 2


def test_a_frozen_model_shares_all_but_what_was_trained(models):
    part = read_part(models / "frozen", MODEL)
    assert set(part) == {"blocks"}
    first, second = part["blocks"]
    assert first == {}
    assert set(second) == {"gate", "up", "down"}
