"""Learning rates by hand; decay where it belongs; clipping; AdamW and Adafactor as published."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xelm.presets import tiny
from xelm.settings import vary
from xelm.training.optimizer import _share_kept, clipped, decaying, optimizer, schedule
from xelm.training_config import TrainConfig


def config(**changes) -> TrainConfig:
    """100 steps, of which 10 warm up, to a tenth of the peak."""
    rates = {"learning_rate": 0.5, "warmup_share": 0.1, "final_rate_share": 0.1, "decay_share": 0.2}
    values = {f"optimizer.{name}": value for name, value in rates.items()}
    plain = TrainConfig(tokens=100 * 32, sequence_length=8, batch_size=4)
    for name, value in changes.items():
        parts = [part for part in ("optimizer", "runtime") if hasattr(getattr(plain, part), name)]
        values[".".join([*parts, name])] = value
    return vary(plain, values)


# Step -> rate. The decay begins with step 10, after the warm-up, and ends with the last, step 99.
WARMUP = {0: 0.05, 1: 0.1, 4: 0.25, 9: 0.5, 10: 0.5}
SCHEDULES = {
    "linear": {55: 0.5 - 0.45 * 45 / 89, 98: 0.05 + 0.45 / 89, 99: 0.05},
    "cosine": {55: 0.05 + 0.45 * (1 + np.cos(np.pi * 45 / 89)) / 2, 99: 0.05},
    # Flat, then 20 steps down.
    "wsd": {50: 0.5, 79: 0.5, 80: 0.5 - 0.45 / 20, 89: 0.275, 98: 0.0725, 99: 0.05},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_is_that_computed_by_hand(name):
    rates = schedule(config(schedule=name))
    for step, value in (WARMUP | SCHEDULES[name]).items():
        assert rates[step] == pytest.approx(value, rel=1e-5), step


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_rises_to_the_peak_and_never_again(name):
    rates = schedule(config(schedule=name))
    assert rates.shape == (100,)
    assert max(rates) == pytest.approx(0.5) and min(rates) == pytest.approx(0.05)
    assert np.all(np.diff(rates[:10]) > 0) and np.all(np.diff(rates[9:]) <= 1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_very_short_trainings_have_rates_between_none_and_the_peak(name):
    wrong = []
    for steps, warmup_share in itertools.product((1, 2, 3), (0.0, 0.5, 1.0)):
        rates = schedule(config(schedule=name, tokens=steps * 32, warmup_share=warmup_share))
        if len(rates) != steps or not np.all((rates > 0) & (rates <= 0.5 + 1e-6)):
            wrong.append((steps, warmup_share, rates))
    assert wrong == []


def test_without_warm_up_the_first_step_has_the_peak():
    assert schedule(config(warmup_share=0.0))[0] == pytest.approx(0.5)


PARAMETERS = {
    "blocks": {
        "up": {"weight": np.full((2, 3, 4), 2.0), "bias": np.full((2, 4), 2.0)},
        "attention_norm": {"scale": np.full((2, 3), 2.0)},
    },
    "embedding": np.full((5, 3), 2.0),
    "norm": {"scale": np.full(3, 2.0)},
    "head_bias": np.full(5, 2.0),
}


def update(gradients, **changes):
    """The first update at a learning rate of 1."""
    parameters, gradients = jax.tree.map(jnp.float32, (PARAMETERS, gradients))
    transformation = optimizer(config(**changes))
    found, _ = transformation.update(gradients, transformation.init(parameters), parameters)
    return found


def test_matrices_decay_and_scales_and_biases_do_not():
    decay = update(jax.tree.map(jnp.zeros_like, PARAMETERS), weight_decay=0.25)
    for path, value in jax.tree_util.tree_leaves_with_path(decay):
        matrix = path[-1].key in ("weight", "embedding")
        wanted = -0.25 * 2.0 if matrix else 0.0
        np.testing.assert_array_equal(value, np.full(value.shape, wanted), str(path))


def test_the_first_update_is_that_of_adamw_by_hand():
    draw = np.random.default_rng(0)
    gradients = jax.tree.map(lambda p: draw.normal(size=p.shape) * 1e-3, PARAMETERS)
    found = update(gradients, weight_decay=0.0)
    # After bias correction the averages of one gradient are itself and its square.
    wanted = jax.tree.map(lambda g: -g / (np.abs(g) + 1e-8), gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


@pytest.mark.parametrize("norm", [0.5, 7.0])
def test_gradients_are_clipped_by_their_global_norm_and_no_further(norm):
    draw = np.random.default_rng(0)
    gradients = jax.tree.map(lambda p: draw.normal(size=p.shape), PARAMETERS)
    scale = norm / float(optax.tree.norm(gradients))
    gradients = jax.tree.map(lambda g: jnp.float32(g * scale), gradients)
    found = clipped(gradients, jnp.float32(norm), 1.0)
    factor = 1.0 if norm < 1 else 1 / norm
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b * factor, rtol=1e-5), found, gradients
    )


def test_the_averages_have_the_configured_lengths():
    gradients = jax.tree.map(lambda p: jnp.full(p.shape, 1e-2), PARAMETERS)
    transformation = optimizer(config(beta1=0.8, beta2=0.7))
    parameters = jax.tree.map(jnp.float32, PARAMETERS)
    state = transformation.update(gradients, transformation.init(parameters), parameters)[1]
    np.testing.assert_allclose(optax.tree.get(state, "mu")["embedding"], 0.2 * 1e-2, rtol=1e-5)
    np.testing.assert_allclose(optax.tree.get(state, "nu")["embedding"], 0.3 * 1e-4, rtol=1e-5)


def test_rows_of_tokens_that_did_not_occur_do_not_decay():
    """Of embeddings that are not the head too: there, every row has a gradient."""
    tables = {
        "embedding": jnp.ones((3, 2)),
        "head": jnp.ones((3, 2)),
        "norm": {"scale": jnp.ones(2)},
    }
    gradients = jax.tree.map(jnp.zeros_like, tables)
    gradients["embedding"] = gradients["embedding"].at[1, 0].set(0.5)
    moving = optimizer(config(weight_decay=0.25))
    found, _ = moving.update(
        jax.tree.map(jnp.zeros_like, tables), moving.init(tables), decaying(tables, gradients)
    )
    np.testing.assert_array_equal(found["embedding"], [[0, 0], [-0.25, -0.25], [0, 0]])
    np.testing.assert_array_equal(found["head"], -0.25 * tables["head"])
    tied = {"embedding": tables["embedding"]}
    np.testing.assert_array_equal(decaying(tied, gradients)["embedding"], tied["embedding"])


def adafactor(gradients, parameters, steps: int, beta1: float, decay: float):
    """The paper's algorithm 4 with its update clipping, without relative steps; an average of
    updates; matrices are the last two dimensions. Returns what parameters move by, by step."""
    rows, columns = np.zeros(parameters.shape[:-1]), np.zeros(np.delete(parameters.shape, -2))
    average, found = np.zeros(parameters.shape), []
    for step in range(steps):
        squares = gradients[step].astype(np.float64) ** 2 + 1e-30
        share = min(0.999, 1 - (step + 1.0) ** -0.8)
        rows = share * rows + (1 - share) * squares.mean(-1)
        columns = share * columns + (1 - share) * squares.mean(-2)
        second = rows[..., None] * columns[..., None, :] / rows.mean(-1)[..., None, None]
        update = gradients[step] / np.sqrt(second)
        update = update / np.maximum(1.0, np.sqrt((update**2).mean((-2, -1), keepdims=True)))
        average = beta1 * average + (1 - beta1) * update
        found.append(-(average + decay * parameters))
    return found


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_adafactor_is_that_of_the_paper(beta1):
    draw = np.random.default_rng(0)
    weight = draw.normal(size=(3, 128, 192)).astype(np.float32)
    moving = optimizer(config(name="adafactor", beta1=beta1, weight_decay=0.1))
    parameters = {"weight": jnp.asarray(weight), "scale": jnp.ones(128)}
    # Of unequal size, so that clipping matters for some.
    sizes = np.array(
        [[1, 5, 0.2, 1], [1, 1, 1, 1], [1, 0.1, 30, 2]], np.float32
    ).T  # by step, layer
    gradients = [
        s[:, None, None] * draw.normal(size=weight.shape).astype(np.float32) for s in sizes
    ]
    state = moving.init(parameters)
    wanted = adafactor(gradients, weight, 4, beta1, 0.1)
    for gradient, expected in zip(gradients, wanted):
        given = {"weight": jnp.asarray(gradient), "scale": jnp.full(128, 2.0)}
        updates, state = moving.update(given, state, parameters)
        np.testing.assert_allclose(updates["weight"], expected, rtol=2e-4, atol=1e-5)
    if not beta1:  # of a constant gradient, signs; and vectors do not decay
        np.testing.assert_allclose(updates["scale"], -1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("tokens", 0, "tokens must be at least 1; got 0"),
        ("batch_size", 3, "multiple of runtime.accumulation_steps; got 3 and 2"),
        ("warmup_share", 1.5, "warmup_share must be between 0 and 1; got 1.5"),
        ("learning_rate", 0.0, "learning_rate must be above 0; got 0.0"),
        ("clip_norm", float("nan"), "clip_norm must be above 0; got nan"),
        ("weight_decay", -0.1, "weight_decay must be at least 0; got -0.1"),
        ("beta2", 1.0, "beta2 must be at least 0 and below 1; got 1.0"),
        ("mesh_data", -1, "mesh_data must be at least 1; got -1"),
        ("random_seed", -1, "random_seed must be at least 0; got -1"),
    ],
)
def test_a_configuration_that_cannot_be_trained_is_refused_when_made(field, value, fault):
    values = {"batch_size": 4, "accumulation_steps": 2, field: value}
    with pytest.raises(ValueError, match=fault):
        config(**values)


def test_averages_that_bfloat16_would_round_away_are_refused():
    with pytest.raises(ValueError, match=r"beta2 must be at most \.95 for .*; got 0\.98"):
        config(moments_dtype="bfloat16", beta2=0.98)
    config(moments_dtype="bfloat16", beta2=0.98, name="adafactor")  # which has none


def test_squares_of_adafactor_are_never_older_than_a_thousand_steps():
    assert _share_kept(0, 0.8) == 0.0 and _share_kept(99, 0.8) == pytest.approx(1 - 100**-0.8)
    assert _share_kept(100_000, 0.8) == pytest.approx(0.999)


def test_experts_may_not_see_the_rows_of_the_seed_in_its_order():
    with pytest.raises(ValueError, match=r"experts\.random_seed must differ"):
        replace(tiny(), experts=replace(tiny().experts, random_seed=tiny().seed.random_seed))
    for part in ("seed", "experts"):
        with pytest.raises(ValueError, match=rf"must be above {part}\.random_seed"):
            seen = getattr(tiny(), part).random_seed
            others = {"seed": 0, "experts": 1, "grow": seen} if part == "experts" else {"seed": 5}
            replace(
                tiny(),
                **{n: replace(getattr(tiny(), n), random_seed=v) for n, v in others.items()},
            )
    replace(tiny(), model=None, experts=tiny().seed)  # a seed that was trained elsewhere


def test_dense_has_the_training_of_the_experts_with_a_rate_and_a_batch_of_its_own():
    made = replace(tiny(), dense_learning_rate=0.25, dense_batch_size=6)
    assert made.dense == vary(made.experts, {"optimizer.learning_rate": 0.25, "batch_size": 6})
    assert made.dense.tokens == made.experts.tokens == 8_000_000
    with pytest.raises(ValueError, match=r"dense: batch_size must be at least 1; got 0"):
        replace(tiny(), dense_batch_size=0)


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError, match=r"batch_size must .*; optimizer.learning_rate must"):
        config(batch_size=0, learning_rate=-1.0)
