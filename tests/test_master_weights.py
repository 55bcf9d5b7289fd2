"""Masters in halves, averages in bfloat16: what is kept, and going on in other dtypes."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_training import (
    CONFIG,
    GOLDEN,
    MODEL,
    Interrupt,
    assert_same_bits,
    assert_same_lines,
    interrupt_at,
    losses,
)

from clustering.errors import UserError
from xelm.settings import vary
from xelm.training.compiled import compile_steps, state_of
from xelm.training.lookups import spread_lookup
from xelm.training.master_weights import join_weights, split_weights
from xelm.training.sharding import make_mesh

WIDE = replace(MODEL, width=128, head_size=64, feedforward_width=256, vocabulary_size=512)
HALF = {"runtime.dtype": "bfloat16"}
SMALL = {**HALF, "runtime.moments_dtype": "bfloat16"}
FACTORED = {"optimizer.name": "adafactor"}


# Masters


def test_halves_make_the_whole_to_the_last_bit():
    draw = np.random.default_rng(0)
    some = draw.integers(0, 2**32, 100_000, dtype=np.uint32)
    # Exactly between two bfloat16, above and below it; signs, zeros, the smallest and infinities.
    ties = (np.arange(0x3F00, 0x3F40, dtype=np.uint32)[:, None] << 16) + [0x7FFF, 0x8000, 0x8001]
    odd = [0, 0x80000000, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x00800000]
    bits = np.concatenate([some, ties.ravel(), ties.ravel() | 0x80000000, odd]).astype(np.uint32)
    bits = bits[np.isfinite(bits.view(np.float32)) | np.isin(bits, odd)]
    # Rounded up, the last would be no number any more.
    bits = bits[(bits & 0x7FFFFFFF < 0x7F7F8000) | np.isin(bits, odd)]
    masters = {"weight": jnp.asarray(bits.view(np.float32))}
    read, remainders = split_weights(masters, "bfloat16")
    assert (read["weight"].dtype, remainders["weight"].dtype) == (jnp.bfloat16, jnp.int16)
    again = np.asarray(join_weights(read, remainders)["weight"]).view(np.uint32)
    np.testing.assert_array_equal(again, bits)


def test_the_half_that_is_read_is_the_nearest():
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    read, _ = split_weights({"weight": jnp.asarray(values)}, "bfloat16")
    np.testing.assert_array_equal(
        np.asarray(read["weight"], np.float32),
        np.asarray(jnp.asarray(values).astype(jnp.bfloat16), np.float32),
    )


def test_vectors_are_not_halved_and_nothing_is_for_float32(parameters):
    parameters = jax.tree.map(jnp.asarray, parameters)
    read, remainders = split_weights(parameters, "float32")
    assert remainders == {}
    jax.tree.map(np.testing.assert_array_equal, read, parameters)
    read, remainders = split_weights(parameters, "bfloat16")
    dtypes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(read)
    }
    assert {path for path, dtype in dtypes.items() if dtype == jnp.bfloat16} == set(remainders)
    assert set(dtypes) - set(remainders) == {
        "blocks/attention_norm/scale",
        "blocks/feedforward_norm/scale",
        "norm/scale",
    }


@pytest.mark.slow
def test_half_precision_stays_close_to_full(trained):
    _, metrics = trained(vary(CONFIG, HALF))
    assert losses(metrics) != pytest.approx(GOLDEN, abs=1e-6)
    np.testing.assert_allclose(losses(metrics), GOLDEN, rtol=5e-3)


def test_masters_move_by_less_than_bfloat16_can_hold(trained, parameters, capsys):
    # By some 1e-6, of weights of some .02 whose bfloat16 are 1e-4 apart.
    config = vary(
        CONFIG,
        {"tokens": 3 * 128, "optimizer.learning_rate": 3e-7, "optimizer.weight_decay": 0.0, **HALF},
    )
    result, _ = trained(config)
    said = "test: on a CPU, training in bfloat16 takes more memory than in float32; set runtime"
    assert capsys.readouterr().err.count(said) == 1
    before, after = (
        np.asarray(tree["blocks"]["up"]["weight"]) for tree in (parameters, result.parameters)
    )
    assert after.dtype == np.float32
    moved = np.abs(after - before)
    assert 1e-7 < np.median(moved) < 1e-6
    assert (jnp.asarray(after).astype(jnp.bfloat16) == before.astype(jnp.bfloat16)).mean() > 0.9


@pytest.mark.slow
def test_moments_in_bfloat16_stay_close(trained):
    _, metrics = trained(vary(CONFIG, {"runtime.moments_dtype": "bfloat16"}))
    assert losses(metrics) != pytest.approx(GOLDEN, abs=1e-6)
    np.testing.assert_allclose(losses(metrics), GOLDEN, rtol=1e-3)


def test_gradients_of_a_table_are_summed_in_float32():
    """Ones, of a token that is met four thousand times: bfloat16 counts to 256."""
    with jax.set_mesh(make_mesh(CONFIG)):
        gradient = jax.jit(jax.grad(lambda t: spread_lookup(t, jnp.full((8, 512), 3)).sum()))(
            jnp.ones((5, 4), jnp.bfloat16)
        )
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient[3].astype(np.float32), 4096.0)


# What is kept between steps


@pytest.mark.slow
def test_adafactor_learns_at_the_rates_of_adamw(trained):
    config = vary(
        CONFIG,
        {"tokens": 150 * 128, "optimizer.learning_rate": 2e-2, "runtime.checkpoint_every": 1000},
    )
    _, metrics = trained(vary(config, {**FACTORED, "runtime.moments_dtype": "bfloat16"}))
    assert metrics[-1]["loss"] < 0.7


@pytest.mark.parametrize(
    ("changes", "bytes_each"),
    [
        ({}, 4 + 8),
        (HALF, 4 + 8),
        (SMALL, 4 + 4),
        ({**SMALL, **FACTORED}, 4 + 2),
        ({**HALF, **FACTORED, "optimizer.beta1": 0.0}, 4),
    ],
)
def test_state_takes_the_bytes_that_it_should(changes, bytes_each):
    config = vary(CONFIG, changes)
    state = state_of(WIDE, config, make_mesh(config))
    taken = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert taken / WIDE.parameter_count == pytest.approx(bytes_each, rel=0.05)


# Going on in other dtypes


@pytest.mark.slow
def test_a_training_goes_on_in_other_dtypes(trained, capsys):
    """And once more after an interruption in the new ones, bit for bit."""
    for folder, stops in {"once": (), "twice": (15,)}.items():
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
            interrupt_at(patch, 8)
            trained(folder=folder)
        for step in stops:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
                interrupt_at(patch, step)
                trained(vary(CONFIG, SMALL), folder)
    (once, metrics), (twice, other) = (
        trained(vary(CONFIG, SMALL), folder) for folder in ("once", "twice")
    )
    said = capsys.readouterr().err
    changed = ", dtype bfloat16 (was float32), moments_dtype bfloat16 (was float32)\n"
    assert said.count(f"resumes after step 6{changed}") == 2
    assert said.count("resumes after step 12\n") == 1
    assert_same_bits(once, twice)
    assert_same_lines(metrics, other)
    assert losses(metrics)[:6] == pytest.approx(GOLDEN[:6], abs=1e-4)
    assert losses(metrics)[6:] != pytest.approx(GOLDEN[6:], abs=1e-6)
    np.testing.assert_allclose(losses(metrics), GOLDEN, rtol=5e-3)


@pytest.mark.slow
def test_a_training_goes_on_in_other_parts_and_with_less_kept(trained, capsys):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 8)
        trained()
    _, metrics = trained(
        vary(CONFIG, {"runtime.accumulation_steps": 2, "runtime.rematerialise": True})
    )
    assert "resumes after step 6\n" in capsys.readouterr().err
    np.testing.assert_allclose(losses(metrics), GOLDEN, atol=1e-4)


def test_masters_are_the_same_in_other_dtypes(parameters):
    mesh = make_mesh(CONFIG)
    full, half = (compile_steps(MODEL, vary(CONFIG, changes), mesh) for changes in ({}, SMALL))
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda array: array.sharding, full.alone[0].parameters)
        state = full.create[0](jax.device_put(parameters, placed))
        other = half.convert[0](state.saved)
        back = full.convert[0](other)
    assert other.parameters["embedding"].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(other.optimizer)} == {
        jnp.dtype("bfloat16"),
        jnp.dtype("int32"),
    }
    jax.tree.map(np.testing.assert_array_equal, back.parameters, parameters)
    jax.tree.map(lambda a, b: a.dtype == b.dtype or pytest.fail("dtype"), back, state.saved)


def test_another_optimiser_is_not_gone_on_with(trained):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 8)
        trained()
    with pytest.raises(UserError, match=r"optimizer\.name was adamw, now adafactor"):
        trained(vary(CONFIG, FACTORED))
