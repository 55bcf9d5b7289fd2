"""From measurements to rows, intervals and summaries."""

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest

from xelm.data.text_stats import TextStats
from xelm.evaluation.reliability import Reliability
from xelm.evaluation.results import Results, Row, Summary
from xelm.evaluation.summaries import (
    Background,
    CalibrationSums,
    Measurement,
    RouterSums,
    summarise,
)

BYTES = {"en": np.array([100, 300, 200]), "de": np.array([150, 250]), "pl": np.array([400])}
TOKENS = {"en": np.array([30, 70, 50]), "de": np.array([40, 60]), "pl": np.array([90])}
BITS = {  # a byte, of every document
    "seed": {"en": 2.0, "de": 3.0, "pl": 4.0},
    "dense": {"en": 1.8, "de": 2.7, "pl": 4.4},
    "x": {"en": 1.5, "de": 3.3, "pl": 5.0},
    "y": {"en": 2.5, "de": 2.4, "pl": 3.9},
}
EXPECTED = Background(
    experts=["x", "y"],
    languages=["en", "de"],
    trained={"dense": ["en", "de"], "x": ["en"], "y": ["de"], "ensemble": ["en", "de"]},
)


def nats(system, tag):
    return BITS[system][tag] * math.log(2) * BYTES[tag].astype(float)


def plain():
    return {tag: {(s, None): Measurement(nats=nats(s, tag)) for s in BITS} for tag in BYTES}


def by_key(results: Results) -> tuple[dict[tuple, Row], dict[tuple, Summary]]:
    rows = {(row.system, row.routing, row.language): row for row in results.rows}
    return rows, {(each.system, each.routing): each for each in results.summaries}


def test_equal_documents_leave_no_doubt():
    rows, summaries = by_key(summarise(plain(), TOKENS, BYTES, EXPECTED))
    for system, bits in BITS.items():
        for tag in ("en", "de"):
            row = rows[system, None, tag]
            assert row.bits_per_byte == pytest.approx(bits[tag])
            assert row.bits_per_byte_95 == pytest.approx((bits[tag], bits[tag]))
        assert rows[system, None, "pl"].bits_per_byte_95 is None  # one document
        mean = summaries[system, None].bits_per_byte
        assert mean.value == pytest.approx((bits["en"] + bits["de"]) / 2)
        assert mean.interval == pytest.approx((mean.value, mean.value))
    assert summaries["dense", None].above_dense is None
    assert summaries["seed", None].above_dense.value == pytest.approx((0.2 + 0.3) / 2)


def test_forgetting_is_of_the_other_languages_of_the_corpus():
    _, summaries = by_key(summarise(plain(), TOKENS, BYTES, EXPECTED))
    assert summaries["x", None].forgetting.value == pytest.approx(3.3 - 3.0)  # in German
    assert summaries["y", None].forgetting.value == pytest.approx(2.5 - 2.0)
    assert summaries["seed", None].forgetting is summaries["dense", None].forgetting is None


def test_the_transfer_gap_is_what_training_saves_less_what_it_saves_elsewhere():
    _, summaries = by_key(summarise(plain(), TOKENS, BYTES, EXPECTED))
    dense = (0.2 / 2 + 0.3 / 3) / 2 - (4.0 - 4.4) / 4
    assert summaries["dense", None].transfer_gap.value == pytest.approx(dense)
    x = 0.5 / 2 - ((3.0 - 3.3) / 3 + (4.0 - 5.0) / 4) / 2
    assert summaries["x", None].transfer_gap.value == pytest.approx(x)
    assert summaries["x", None].transfer_gap.interval is None  # Polish is one document
    assert summaries["seed", None].transfer_gap is None


def test_experts_of_documents_have_no_languages_to_forget():
    expected = Background(experts=["x", "y"], languages=["en", "de"], trained={})
    _, summaries = by_key(summarise(plain(), TOKENS, BYTES, expected))
    assert summaries["x", None].forgetting is summaries["x", None].transfer_gap is None


def test_a_difference_is_of_the_same_documents():
    """Documents differ much, systems by the same in each: of the difference there is no doubt."""
    hard = np.random.default_rng(0).uniform(1, 9, 50)
    sizes, tokens = {"en": np.full(50, 100)}, {"en": np.full(50, 30)}
    one = Measurement(nats=hard * 100 * math.log(2))
    other = Measurement(nats=(hard + 0.25) * 100 * math.log(2))
    measured = {"en": {("dense", None): one, ("x", None): other}}
    expected = Background(experts=["x"], languages=["en"], trained={})
    rows, summaries = by_key(summarise(measured, tokens, sizes, expected))
    low, high = rows["x", None, "en"].bits_per_byte_95
    assert high - low > 1
    assert summaries["x", None].above_dense.interval == pytest.approx((0.25, 0.25))


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """There are 300 samples of 60 documents from one distribution, whose ratio of sums is known."""
    draw, held = np.random.default_rng(2), 0
    measured, sizes, tokens = {}, {}, {}
    for number in range(300):
        size = draw.integers(50, 500, 60)
        measured[str(number)] = {
            ("seed", None): Measurement(nats=size * math.log(2) * draw.gamma(4, 0.5, 60))
        }
        sizes[str(number)], tokens[str(number)] = size, size // 3
    results = summarise(measured, tokens, sizes, Background(experts=[], languages=[], trained={}))
    for row in results.rows:
        low, high = row.bits_per_byte_95
        held += low <= 2.0 <= high
    assert 0.88 * 300 <= held <= 0.98 * 300


def test_regret_is_against_the_best_expert_and_summed_over_languages():
    measured = plain()
    for tag, right in (("en", 1.0), ("de", 0.0)):
        weighed = RouterSums(Reliability.of(np.full(10, 0.9), np.full(10, right)), 5.0, 15.0)
        measured[tag]["ensemble", "tfidf"] = Measurement(nats=nats("dense", tag), router=weighed)
    rows, summaries = by_key(summarise(measured, TOKENS, BYTES, EXPECTED))
    found = rows["ensemble", "tfidf", "en"].router
    assert found.regret == pytest.approx(1.8 - 1.5)
    assert (found.accuracy, found.entropy, found.experts_read) == (1.0, 0.5, 1.5)
    assert found.ece == pytest.approx(0.1)
    whole = summaries["ensemble", "tfidf"].router
    assert whole.regret == pytest.approx((0.3 + 0.3) / 2)
    assert whole.accuracy == 0.5 and whole.ece == pytest.approx(0.4)
    # Where an expert was not asked, nobody knows which is best.
    del measured["en"]["y", None]
    rows, summaries = by_key(summarise(measured, TOKENS, BYTES, EXPECTED))
    assert rows["ensemble", "tfidf", "en"].router.regret is None
    assert summaries["ensemble", "tfidf"].router.regret is None


def test_what_is_written_is_what_is_read():
    measured = plain()
    some = Reliability.of(np.array([0.2, 0.9]), np.array([0.0, 1.0]))
    measured["en"]["seed", None].calibration = CalibrationSums(some, 0.7)
    measured["en"]["ensemble", "learned"] = Measurement(
        nats=nats("x", "en"), router=RouterSums(some, 0.3, 2.0)
    )
    results = summarise(measured, TOKENS, BYTES, EXPECTED)
    counts = {field.name: 1 for field in fields(TextStats)}
    texts = {tag: TextStats(**counts | {"language": tag}) for tag in BYTES}
    again = Results.from_json(json.loads(json.dumps(replace(results, texts=texts).to_json())))
    assert (again.rows, again.summaries) == (results.rows, results.summaries)
    rows, _ = by_key(results)
    assert rows["seed", None, "en"].calibration.brier == pytest.approx(0.35)
    assert rows["seed", None, "de"].calibration is None
