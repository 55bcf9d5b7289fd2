"""Columns of the learned router for new experts: the others' do not move."""

import numpy as np
import pytest
from scipy.special import softmax

from xelm.runs.columns import added_columns, balanced
from xelm.runs.fit import all_columns

EXPERTS, SIZE = 4, 6


@pytest.fixture(scope="module")
def examples():
    """Points around a centre for each expert, of unequal numbers, for fitting and held out."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(EXPERTS, SIZE))
    labels = np.repeat(np.arange(EXPERTS), [90, 60, 120, 30])
    points = [centres[labels] + 0.5 * draw.normal(size=(len(labels), SIZE)) for _ in range(2)]
    return points[0], points[1], labels


def accuracy(points, labels, weights, bias):
    return np.mean((points @ weights + bias).argmax(axis=1) == labels)


def slope(points, labels, weights, bias):
    """Gradient of the loss of all columns, of scikit-learn's documentation."""
    error = softmax(points @ weights.astype(float) + bias, axis=1) - np.eye(EXPERTS)[labels]
    error *= 100.0 * balanced(labels, EXPERTS)[:, None]
    return points.T @ error + weights, error.sum(axis=0)


@pytest.mark.parametrize("new", [[3], [0], [1, 3]])
def test_the_columns_of_the_others_stay_the_same_bits_and_the_new_ones_are_optimal(examples, new):
    points, _, labels = examples
    weights, bias = all_columns(points, labels)
    known = [number for number in range(EXPERTS) if number not in new]
    kept = (weights[:, known] * np.float32(0.7), bias[known] + np.float32(0.3))
    found = added_columns(points, labels, known, *kept, EXPERTS)
    assert found[0].dtype == found[1].dtype == np.float32
    assert (found[0][:, known] == kept[0]).all() and (found[1][known] == kept[1]).all()
    # No change of the new columns lowers the loss of all; one of the others would.
    by_weights, by_bias = slope(points, labels, *found)
    assert np.abs(by_weights[:, new]).max() < 0.05 and np.abs(by_bias[new]).max() < 0.05
    assert np.abs(by_weights[:, known]).max() > 10


def test_beside_the_columns_of_a_full_fit_the_new_one_is_that_of_the_full_fit(examples):
    points, held_out, labels = examples
    weights, bias = all_columns(points, labels)
    found = added_columns(points, labels, [0, 1, 2], weights[:, :3], bias[:3], EXPERTS)
    assert np.allclose(found[0][:, 3], weights[:, 3], atol=0.05)
    full, added = (accuracy(held_out, labels, *fit) for fit in ((weights, bias), found))
    assert abs(full - added) < 0.01 and added > 0.9


def test_a_new_expert_gets_its_texts_beside_columns_that_never_saw_them(examples):
    points, held_out, labels = examples
    old = labels < 3
    weights, bias = all_columns(points[old], labels[old])
    found = added_columns(points, labels, [0, 1, 2], weights, bias, EXPERTS)
    assert accuracy(held_out[~old], labels[~old], *found) > 0.9
    before = accuracy(held_out[old], labels[old], weights, bias)
    after = accuracy(held_out[old], labels[old], *found)
    assert before - after < 0.03
    # Texts of the others keep the ratios of the others' weights.
    logits = held_out @ found[0] + found[1]
    assert np.allclose(logits[:, :3], held_out @ weights + bias)


def test_every_expert_counts_the_same_however_many_its_examples():
    labels = np.array([0, 0, 0, 1, 2, 2])
    found = balanced(labels, 3)
    sums = np.bincount(labels, weights=found)
    assert np.allclose(sums, 2) and np.isclose(found.sum(), len(labels))
