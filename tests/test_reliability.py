"""How sure, and how often rightly so."""

import numpy as np
import pytest

from xelm.evaluation.reliability import BINS, Reliability, chosen


def test_the_error_is_that_of_bins_by_hand():
    # Two bins of fifteen: around .5 half are right of three, around .95 all of two.
    found = Reliability.of(np.array([0.48, 0.5, 0.52, 0.94, 0.96]), np.array([0, 1, 0, 1, 1.0]))
    first, second = abs((0.48 + 0.5 + 0.52) - 1), abs((0.94 + 0.96) - 2)
    assert found.ece == pytest.approx((first + second) / 5)
    assert found.accuracy == pytest.approx(3 / 5) and found.total == 5


def test_whoever_is_as_often_right_as_sure_has_no_error():
    draw = np.random.default_rng(0)
    confidence = draw.uniform(size=200_000)
    right = (draw.uniform(size=len(confidence)) < confidence).astype(float)
    assert Reliability.of(confidence, right).ece < 0.01
    assert Reliability.of(confidence, 1 - right).ece > 0.4


def test_texts_add_up_to_what_they_are_together():
    draw = np.random.default_rng(1)
    confidence, right = draw.uniform(size=100), draw.integers(2, size=100).astype(float)
    parts = Reliability.of(confidence[:30], right[:30]) + Reliability.of(
        confidence[30:], right[30:]
    )
    whole = Reliability.of(confidence, right)
    assert (parts.total, parts.accuracy) == (100, pytest.approx(whole.accuracy))
    assert parts.ece == pytest.approx(whole.ece)


def test_every_confidence_has_a_bin():
    edges = np.linspace(0, 1, BINS + 1)
    counts = Reliability.of(edges, np.ones(len(edges))).counts
    assert counts.sum() == BINS + 1 and counts[0] == 2  # 0 is with the first edge


def test_a_choice_between_equals_is_right_in_part():
    weights = np.array([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0], [1 / 3] * 3])
    confidence, correct = chosen(weights, 1)
    assert confidence.tolist() == [0.5, 0.8, 1 / 3]
    assert correct.tolist() == [0.5, 1.0, 1 / 3]
    assert chosen(weights, 2)[1].tolist() == [0.0, 0.0, 1 / 3]
