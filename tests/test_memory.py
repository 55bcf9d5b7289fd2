"""The memory of a training step by arithmetic, and rows that are refused by it."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from small_training import CONFIG, MODEL, SOURCES, TEXT
from test_meshes import configured, lowered_step

from clustering.errors import UserError
from xelm.settings import vary
from xelm.training import loop, memory
from xelm.training.memory import check_memory, device_bytes, kept_bytes, state_bytes
from xelm.training.sharding import make_mesh
from xelm.training.trainer import TrainingSpec

# Of one expert on one device: matrices of 48 x 32, and in each of two layers 4 of 32 x 16 and 3 of
# 32 x 64, and 5 norms of 32 values.
WIDE = replace(MODEL, width=32, feedforward_width=64, max_length=512)
PARAMETERS = 48 * 32 + 2 * (4 * 32 * 16 + 3 * 32 * 64) + 5 * 32


def placed(config=CONFIG, mesh=(1, 1, 1, 1)):
    config = configured(mesh, config)
    return config, make_mesh(config)


def test_the_state_is_parameters_averages_and_gradients():
    config, mesh = placed()
    numbers = 4 * 10  # counts of steps and losses that are remembered, at most
    assert 0 <= state_bytes(WIDE, config, mesh) - 16 * PARAMETERS < 4 * numbers + 4000
    half, _ = placed(vary(CONFIG, {"runtime.dtype": "bfloat16"}))
    matrices = PARAMETERS - 5 * 32
    # A bfloat16, the rest of its master weight, two averages and a bfloat16 gradient.
    wanted = 14 * matrices + 16 * 5 * 32
    assert 0 <= state_bytes(WIDE, half, mesh) - wanted < 4 * numbers + 4000
    spread, meshed = placed(mesh=(1, 1, 4, 2))
    assert state_bytes(WIDE, spread, meshed) < state_bytes(WIDE, config, mesh) / 4


def test_a_layer_keeps_what_its_backward_pass_needs():
    config, mesh = placed()  # 8 rows
    products = 32 + 16 + 16 + 2 * 16 + 2 * 64  # input, attended, queries, keys and values, gate, up
    assert kept_bytes(WIDE, config, mesh) == 4 * 8 * 2 * products
    again, _ = placed(vary(CONFIG, {"runtime.rematerialise": True}))
    assert kept_bytes(WIDE, again, mesh) == 4 * 8 * 2 * (32 + 16)
    parts, _ = placed(vary(CONFIG, {"runtime.accumulation_steps": 4}))
    assert kept_bytes(WIDE, parts, mesh) == 4 * 2 * 2 * products


@pytest.mark.parametrize("rematerialise", [False, True])
def test_the_account_is_no_more_than_the_compilers(rematerialise):
    """And not much less for deep models, of which a layer's own work is a small part."""
    deep = replace(WIDE, layer_count=64)
    config = vary(CONFIG, {"runtime.rematerialise": rematerialise})
    config, mesh = placed(config, (1, 2, 2, 2))
    length = 512
    compiled = lowered_step((1, 2, 2, 2), deep, config, length).compile().memory_analysis()
    used = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
    found = state_bytes(deep, config, mesh) + length * kept_bytes(deep, config, mesh)
    assert 0.2 * used < found <= used


def test_rows_that_do_not_fit_are_refused_with_the_longest_that_do():
    config, mesh = placed(vary(CONFIG, {"sequence_length": 512}))
    state, token = (f(WIDE, config, mesh) for f in (state_bytes, kept_bytes))
    check_memory(WIDE, config, mesh, state + 512 * token)
    with pytest.raises(UserError) as refused:
        check_memory(WIDE, config, mesh, state + 300 * token)
    assert re.fullmatch(
        r"rows of 512 tokens need at least \S+ GB on each device, which has \S+ GB: at most 256 "
        r"tokens fit \(sequence_length=256\)\. Less memory is needed with "
        r"runtime\.rematerialise=true, a higher runtime\.accumulation_steps \(now 1\), a smaller "
        r"batch_size \(now 8\), more devices that share all \(runtime\.mesh_fsdp, now 1\)",
        str(refused.value),
    )
    check_memory(WIDE, vary(config, {"sequence_length": 256}), mesh, state + 300 * token)
    helped = {"runtime.rematerialise": True}, {"runtime.accumulation_steps": 4}, {"batch_size": 4}
    for change in helped:
        check_memory(WIDE, vary(config, change), mesh, state + 300 * token)


def test_a_model_that_does_not_fit_at_all_is_refused_without_a_length():
    config, mesh = placed(vary(CONFIG, {"runtime.rematerialise": True}))
    with pytest.raises(UserError, match=r"gradients alone; it has .* with more devices that share"):
        check_memory(WIDE, config, mesh, state_bytes(WIDE, config, mesh) - 1)


def test_a_host_divides_its_memory_among_its_devices(monkeypatch):
    monkeypatch.setattr(memory, "memory_bytes", lambda: 8e9)
    assert device_bytes(placed(mesh=(1, 2, 2, 2))[1]) == 1e9
    assert device_bytes(placed()[1]) == 8e9


def test_a_training_is_refused_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "memory_bytes", lambda: 1e5)
    monkeypatch.setattr(loop, "compile_steps", None)
    spec = TrainingSpec(
        label="test",
        start=lambda shardings: jax.device_put(np.zeros(1), shardings),
        sources=SOURCES,
        config=CONFIG,
        directory=tmp_path / "training",
    )
    with pytest.raises(UserError, match="rows of 16 tokens need at least"):
        loop.train(spec, MODEL, TEXT)
    assert not (tmp_path / "training").exists()
