"""Methods of merging against their formulas on small tensors, their identities and parameters."""

import inspect
import math
from pathlib import Path

import numpy as np
import pytest

from clustering.errors import UserError
from experts.merge_methods import METHODS, Inputs, MergeOptions, check_models, parameters_of

DRAW = np.random.default_rng(0)
BASE = DRAW.normal(size=(6, 5))
MODELS = [BASE + DRAW.normal(size=(6, 5)) for _ in range(3)]
DIFFERENCES = [model - BASE for model in MODELS]


def _merged(method, models=MODELS, weights=None, base=BASE, name="w", **parameters):
    options = MergeOptions(method=method, **parameters)
    inputs = Inputs(
        models=models,
        weights=check_models(options, weights, len(models)),
        base=base if METHODS[method].has_base else None,
        name=name,
        **options.parameters,
    )
    return METHODS[method].combine(inputs)


def _close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-13, atol=1e-13)


def test_linear_is_the_weighted_mean():
    a, b, c = MODELS
    _close(_merged("linear"), (a + b + c) / 3)
    _close(_merged("linear", weights=[1, 2, 5]), (a + 2 * b + 5 * c) / 8)


def test_task_arithmetic_adds_scaled_differences_to_the_base():
    a, b, c = DIFFERENCES
    _close(_merged("task-arithmetic"), BASE + 0.4 * (a + b + c))
    weighted = _merged("task-arithmetic", weights=[1, -0.5, 2], scale=0.5)
    _close(weighted, BASE + 0.5 * (a - 0.5 * b + 2 * c))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("task-arithmetic", {"scale": 1.0}),
        ("ties", {"density": 1.0}),
        ("dare-linear", {"scale": 1.0, "density": 1.0}),
        ("dare-ties", {"density": 1.0}),
    ],
)
def test_one_whole_model_merges_to_itself(method, parameters):
    _close(_merged(method, MODELS[:1], **parameters), MODELS[0])


def test_ties_elects_signs_of_trimmed_differences():
    """By hand: of five entries the two largest are kept; 3 and 2 outvote -4, -1 stands alone."""
    base = np.zeros(5)
    models = [
        np.array([3.0, -1.0, 0.5, 0.0, 0.2]),
        np.array([2.0, 0.1, 0.3, 0.0, -5.0]),
        np.array([-4.0, 0.0, -0.1, 0.0, 6.0]),
    ]
    found = _merged("ties", models, base=base, density=0.4)
    _close(found, [2.5, -1.0, 0.0, 0.0, 6.0])
    _close(_merged("ties", models, base=base, density=0.4, scale=0.5), found / 2)


def test_ties_weighs_in_the_election_and_in_the_mean():
    base, models = np.zeros(2), [np.array([3.0, 3.0]), np.array([-2.0, 1.0])]
    _close(_merged("ties", models, [1, 2], base, density=1.0), [-2.0, 5 / 3])


def test_ties_equals_its_plain_formula():
    kept = [np.where(np.abs(d) >= np.sort(np.abs(d), axis=None)[-12], d, 0) for d in DIFFERENCES]
    stack = np.stack(kept)
    sign = np.where(stack.sum(0) >= 0, 1, -1)
    chosen = np.sign(stack) == sign
    mean = (stack * chosen).sum(0) / np.maximum(chosen.sum(0), 1)
    _close(_merged("ties", density=0.4), BASE + mean)  # 12 of 30 entries


def test_dare_keeps_the_expectation():
    """Of 20,000 entries of 1, each kept with probability .3 and divided by it: the mean is 1 within
    five standard errors, sqrt(.7 / .3 / 20,000)."""
    base, model = np.zeros(20_000), np.ones(20_000)
    found = _merged("dare-linear", [model], base=base, scale=1.0, density=0.3)
    assert set(np.unique(found)) == {0.0, 1 / 0.3}
    assert abs(found.mean() - 1) < 5 * math.sqrt(0.7 / 0.3 / 20_000)


def test_dare_with_ties_averages_what_is_kept_by_sign():
    base, models = np.zeros(2000), [np.full(2000, 2.0), np.full(2000, -1.0)]
    found = _merged("dare-ties", models, base=base, density=0.5)
    assert set(np.unique(found)) == {0.0, 4.0, -2.0}  # neither, the first, the second alone
    assert 400 < (found == -2).sum() < 600  # a quarter


def test_dare_is_drawn_from_its_seed_and_for_each_tensor_and_model():
    base, models = np.zeros(100), [np.ones(100), np.full(100, 10.0)]

    def made(**options):
        return _merged("dare-linear", models, base=base, scale=1.0, **options)

    np.testing.assert_array_equal(made(random_seed=7), made(random_seed=7))
    assert (made(random_seed=7) != made(random_seed=8)).any()
    assert (made(name="v") != made()).any()
    assert (made() == 2).any() and (made() == 20).any()  # not the same entries of both models


def test_slerp_runs_along_the_arc():
    first, second = np.array([2.0, 0.0, 0.0]), np.array([0.0, 2.0, 0.0])
    third = math.radians(30)
    found = _merged("slerp", [first, second], [2, 1])
    _close(found, [2 * math.cos(third), 2 * math.sin(third), 0.0])
    assert np.linalg.norm(found) == pytest.approx(2)
    _close(_merged("slerp", [first, second], [1, 0]), first)
    _close(_merged("slerp", [first, second], [0, 1]), second)
    middle = _merged("slerp", MODELS[:2])
    angles = [
        math.acos((m * middle).sum() / np.linalg.norm(m) / np.linalg.norm(middle))
        for m in (MODELS[0] / np.linalg.norm(MODELS[0]), MODELS[1] / np.linalg.norm(MODELS[1]))
    ]
    assert sum(angles) == pytest.approx(
        math.acos((MODELS[0] * MODELS[1]).sum() / math.prod(map(np.linalg.norm, MODELS[:2])))
    )


def test_slerp_is_linear_where_there_is_no_arc():
    x = np.array([1.0, -2.0])
    _close(_merged("slerp", [x, 3 * x]), 2 * x)
    _close(_merged("slerp", [x, -3 * x]), -x)
    _close(_merged("slerp", [x, 0 * x], [3, 1]), 0.75 * x)
    _close(_merged("slerp", [x, x]), x)


def test_slerp_keeps_the_length_at_small_angles():
    first = np.array([1.0, 0.0])
    second = np.array([math.cos(1e-3), math.sin(1e-3)])
    assert np.linalg.norm(_merged("slerp", [first, second])) == pytest.approx(1, abs=1e-14)


def test_model_stock_stays_at_the_base_where_differences_are_orthogonal():
    base = np.ones(3)
    _close(_merged("model-stock", [base + each for each in np.eye(3)], base=base), base)


def test_model_stock_is_the_mean_where_models_agree():
    _close(_merged("model-stock", [MODELS[0]] * 3), MODELS[0])


def test_model_stock_is_its_formula():
    """Two differences at 60 degrees: t = 2 (1/2) / (1 + 1/2) = 2/3."""
    base = np.array([5.0, 5.0])
    one, other = np.array([2.0, 0.0]), 4 * np.array([0.5, math.sqrt(0.75)])
    found = _merged("model-stock", [base + one, base + other], base=base)
    _close(found, base + 2 / 3 * (one + other) / 2)
    opposite = _merged("model-stock", [base + one, base - one * [1, 0] + [0, 0.1]], base=base)
    _close(opposite, base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tie"}, "unknown method 'tie'; there are: linear, task-arithmetic, ties"),
        ({"density": 0.5}, "density has no effect on linear; it goes with ties, dare-linear"),
        ({"method": "slerp", "scale": 1.0}, "scale has no effect on slerp"),
        ({"method": "ties", "random_seed": 1}, "it goes with dare-linear, dare-ties"),
        ({"method": "ties", "density": 0.0}, "above 0 and at most 1; got 0.0"),
        ({"method": "ties", "density": 1.5}, "above 0 and at most 1; got 1.5"),
        ({"method": "ties", "density": math.nan}, "above 0 and at most 1; got nan"),
        ({"method": "ties", "scale": math.inf}, "scale must be a finite number; got inf"),
        ({"method": "dare-ties", "random_seed": -1}, "at least 0; got -1"),
    ],
)
def test_impossible_parameters_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        MergeOptions(**options)


@pytest.mark.parametrize(
    ("method", "weights", "count", "message"),
    [
        ("slerp", None, 3, "slerp merges exactly 2 models; got 3"),
        ("model-stock", None, 1, "model-stock merges 2 or more models; got 1"),
        ("model-stock", [1, 2], 2, "model-stock takes no weights; got 1, 2"),
        ("ties", [1], 2, "one weight for each of 2 models; got 1"),
        ("ties", [1, -1], 2, "weights of ties must not be negative nor all zero; got 1, -1"),
        ("dare-linear", [1, math.nan], 2, "must be finite; got 1, nan"),
    ],
)
def test_impossible_numbers_of_models_and_weights_are_refused(method, weights, count, message):
    with pytest.raises(UserError, match=message):
        check_models(MergeOptions(method=method), weights, count)


def test_every_method_names_its_paper_and_stands_in_the_docs():
    page = (Path(__file__).parent.parent / "docs" / "merging.md").read_text()
    for name, method in METHODS.items():
        authors, _, address = method.paper.partition(", ")
        assert authors.split()[0] in inspect.getdoc(method.combine)
        rows = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert f"[{authors}]" in rows[0] and f"[{authors}]: {address}" in page
        for parameter, default in parameters_of(method).items():
            assert f"`--{parameter.replace('_', '-')}` ({default:g})" in rows[1]
