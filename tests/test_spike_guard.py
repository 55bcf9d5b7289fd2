"""Steps that would do harm are left out, and trainings that are no use are given up."""

from functools import partial

import jax
import numpy as np
import pytest
from small_training import (
    CONFIG,
    MODEL,
    SHARES,
    SOURCES,
    Interrupt,
    assert_same_bits,
    assert_same_lines,
    interrupt_at,
    losses,
)

from clustering.errors import UserError
from xelm.data.rows import ORIGIN, batches
from xelm.data.text_format import TextFormat
from xelm.models.target import CPU, GIB, Target
from xelm.settings import vary
from xelm.training import loop, spike_guard
from xelm.training.compiled import compile_steps
from xelm.training.expert_axis import stack
from xelm.training.sharding import make_mesh
from xelm.training.trainer import DivergedError


def test_a_training_that_diverges_is_stopped_before_it_is_saved(trained, tmp_path):
    config = vary(
        CONFIG,
        {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 1e30, "runtime.log_every": 1000},
    )
    said = r"test has diverged: its parameters are not finite after step 6; a peak rate of 1e\+30"
    with pytest.raises(DivergedError, match=said):
        trained(config)
    assert not list((tmp_path / "training" / "checkpoints").glob("[0-9]*"))


def batches_of(config):
    return list(batches(SOURCES, config, TextFormat(start_id=1, end_id=2)))


GPU = Target("gpu", 16 * GIB)


@pytest.mark.parametrize("target", [CPU, GPU], ids=["CPU", "GPU"])
def test_a_step_without_a_number_changes_nothing_but_what_is_counted(parameters, target):
    mesh = make_mesh(CONFIG)
    functions = compile_steps(MODEL, CONFIG, mesh, target)
    batch = {name: array for name, array in batches_of(CONFIG)[0].items() if name not in ORIGIN}
    spoilt = jax.tree.map(np.copy, parameters)
    spoilt["norm"]["scale"][3] = np.nan
    with jax.set_mesh(mesh):
        before = stack([functions.create[0](spoilt)], functions.state)
        kept = jax.tree.map(np.array, before)
        state, metrics = functions.step(before, batch, np.array([1e-3]))
    for part in ("parameters", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(kept, part))
    assert np.isnan(metrics.loss) and (metrics.skipped, metrics.most_in_a_row) == (1, 1)
    assert (state.step, state.guard.known) == (1, 0) and not state.guard.losses.any()
    assert not functions.finite(state.parameters) and functions.finite(parameters)


def test_a_step_for_gpus_has_no_conditional_whose_results_would_be_copied(parameters):
    mesh = make_mesh(CONFIG)
    batch = {name: array for name, array in batches_of(CONFIG)[0].items() if name not in ORIGIN}
    conditionals, states = [], []
    for target in (CPU, GPU):
        functions = compile_steps(MODEL, CONFIG, mesh, target)
        with jax.set_mesh(mesh):
            state = stack([functions.create[0](parameters)], functions.state)
            step = functions.step.lower(state, batch, np.array([1e-3]))
            states.append(jax.tree.map(np.array, step.compile()(state, batch, np.array([1e-3]))))
        conditionals.append("stablehlo.case" in step.as_text())
    assert conditionals == [True, False]
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), *states)


def skip(monkeypatch, steps):
    """To these steps, the losses before them look as if they had been far lower."""

    def spying(model, config, mesh):
        functions = compile_steps(model, config, mesh)
        places = jax.tree.map(lambda array: array.sharding, functions.state.guard)

        def step(state, batch, rate):
            if int(state.step[0]) + 1 not in steps:
                return functions.step(state, batch, rate)
            guard = jax.tree.map(np.array, state.guard)
            low = guard._replace(losses=guard.losses - 100, known=np.full(1, 1000, np.int32))
            low = jax.device_put(low, places)
            state, metrics = functions.step(state._replace(guard=low), batch, rate)
            guard = state.guard._replace(losses=guard.losses, known=guard.known)
            guard = jax.device_put(guard, places)
            return state._replace(guard=guard), metrics

        return functions._replace(step=step)

    monkeypatch.setattr(loop, "compile_steps", spying)


def test_steps_that_are_skipped_are_counted_and_the_training_goes_on(trained, monkeypatch):
    plain, metrics = trained(folder="plain")
    skip(monkeypatch, {5, 6, 7, 12})
    skipped, other = trained(folder="skipped")
    assert [line["skipped"] for line in other] == [0] * 4 + [1, 2] + [3] * 5 + [4] * 9
    assert losses(other)[:5] == losses(metrics)[:5] and losses(other)[8] != losses(metrics)[8]
    assert skipped.language_tokens == plain.language_tokens
    # Steps 6 and 12, which are saved, are among them.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 15)
        trained(folder="broken")
    again, lines = trained(folder="broken")
    assert_same_bits(again, skipped)
    assert_same_lines(lines, other)


@pytest.mark.parametrize("log_every", [1, 10])
def test_after_too_many_in_a_row_a_training_ends(trained, monkeypatch, tmp_path, log_every):
    skip(monkeypatch, set(range(8, 12)))  # over before anybody looks, if that is seldom
    config = vary(
        CONFIG,
        {"runtime.skip_limit": 4, "runtime.log_every": log_every, "runtime.checkpoint_every": 7},
    )
    seen = 11 if log_every == 1 else 14
    said = f"diverged: 4 steps in a row were skipped; at step {seen} it has loss 3.*reads rows "
    with pytest.raises(DivergedError, match=said) as caught:
        trained(config)
    assert [path.name for path in (tmp_path / "training/checkpoints").iterdir()] == ["7"]
    batch = batches_of(config)[seen - 1]
    rows = {tag: [] for tag in SHARES}
    for index, row in zip(batch["language"], batch["row"]):
        rows[list(SHARES)[index]].append(row)
    for tag, numbers in rows.items():
        assert f"{tag} {', '.join(map(str, numbers))}" in str(caught.value)


def test_losses_far_above_those_before_are_spikes():
    draw, of = np.random.default_rng(0), spike_guard.new_guard()
    asked, later = jax.jit(spike_guard.accepts), jax.jit(spike_guard.updated)
    norm, yes, no = np.float32(1), np.bool_(True), np.bool_(False)
    for number, loss in enumerate((3 + draw.normal(size=200)).astype(np.float32)):
        # Nothing is a spike before there are enough losses to tell.
        assert bool(asked(of, np.float32(50), norm)) == (number < 64)
        if number >= 64:
            known = np.asarray(of.losses)[: min(number, 128)]
            edge = known.mean() + 6 * known.std()
            assert asked(of, np.float32(edge - 0.01), norm)
            assert not asked(of, np.float32(edge + 0.01), norm)
        assert not asked(of, np.float32("nan"), norm)
        assert not asked(of, loss, np.float32("inf"))
        of = later(of, loss, yes)
        assert (of.known, of.skipped, of.in_a_row) == (number + 1, 0, 0)
    for times in range(1, 4):
        of = later(of, np.float32("nan"), no)
        assert (of.known, of.skipped, of.in_a_row, of.most_in_a_row) == (200, times, times, times)
    of = later(of, np.float32(3), yes)
    assert (of.in_a_row, of.most_in_a_row) == (0, 3)


def test_what_lasts_is_no_spike_for_long():
    of, later, asked = (
        spike_guard.new_guard(),
        jax.jit(spike_guard.updated),
        jax.jit(spike_guard.accepts),
    )
    for _ in range(150):
        of = later(of, np.float32(2), np.bool_(True))
    # Three nats above even losses, which a few rows of a hard language may be, are none.
    assert asked(of, np.float32(4.9), np.float32(1))
    skipped = 0
    for _ in range(50):
        made = asked(of, np.float32(6), np.float32(1))
        of = later(of, np.float32(6), made)
        skipped += not made
    assert 1 < skipped < 10
    assert asked(of, np.float32(6), np.float32(1))


def test_a_start_that_is_no_number_is_not_blamed_on_the_rate(trained, parameters):
    spoilt = jax.tree.map(lambda x: x * np.float32("nan"), parameters)
    with pytest.raises(
        UserError, match="test has loss nan and gradient norm nan before anything was learned"
    ):
        trained(start=spoilt)
