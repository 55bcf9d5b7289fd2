"""Held-out text: which it is, and trainings that are measured on it."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from small_training import (
    CONFIG,
    MODEL,
    SHARES,
    SOURCES,
    TEXT,
    Interrupt,
    assert_same_bits,
    interrupt_at,
    source,
)

from xelm.config import HeldOutConfig
from xelm.data.held_out import divide, held_out
from xelm.data.rows import LanguageShare
from xelm.data.store import TokenizedLanguage, shuffled
from xelm.inference.scoring import score_documents
from xelm.models.parameters import for_inference
from xelm.settings import vary
from xelm.training.held_out import HeldOutText
from xelm.training.loop import train_together
from xelm.training.metrics import best, read_metrics, without_improvement
from xelm.training.trainer import TrainingSpec

# Four documents are learned by heart; the others are of the same kind.
LEARNED = [replace(source(tag), documents=np.arange(4)) for tag in SHARES]
HELD_OUT = [replace(source(tag), documents=np.arange(4, 40)) for tag in SHARES]
OVERFITTED = vary(
    CONFIG,
    {
        "tokens": 80 * 128,
        "optimizer.learning_rate": 2e-2,
        "optimizer.schedule": "wsd",
        "evaluation.every": 10,
    },
)


@pytest.fixture(scope="module")
def whole(parameters, tmp_path_factory):
    """A training that goes on to its end, its result, and its measurements."""
    folder = tmp_path_factory.mktemp("whole")
    spec = TrainingSpec(
        label="whole",
        start=lambda shardings: jax.device_put(parameters, shardings),
        sources=LEARNED,
        config=OVERFITTED,
        held_out=HELD_OUT,
        directory=folder / "training",
    )
    result = train_together([spec], MODEL, TEXT)[0]
    return result, read_metrics(folder / "training" / "metrics.jsonl"), lines(folder)


def lines(tmp_path, folder="training"):
    path = tmp_path / folder / "held_out.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_measurement_is_what_inference_gives(trained, parameters, tmp_path):
    # Rows of one document each: 23 tokens, their start and their end.
    config = vary(CONFIG, {"sequence_length": 25, "runtime.accumulation_steps": 2})
    result, _ = trained(config, sources=LEARNED, held_out=HELD_OUT)
    first, *_, last = lines(tmp_path)
    assert (first["step"], first["tokens"]) == (0, 0)
    for line, weights in ((first, parameters), (last, result.parameters)):
        bits = {}
        for each in HELD_OUT:
            documents = [each.ids.document(number) for number in each.documents]
            scores = score_documents(
                MODEL, for_inference(weights), documents, text_format=TEXT, context_length=31
            )
            bits[each.ids.language] = -np.concatenate(scores).sum() / (36 * 23) / np.log(2)
        assert line["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        nats = {tag: each * np.log(2) * 23 / 24 for tag, each in bits.items()}
        mean = sum(SHARES[tag] * each for tag, each in nats.items())
        assert line["loss"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.slow
def test_the_result_has_the_weights_of_the_best_measurement(whole, trained, tmp_path):
    result, metrics, measured = whole
    assert [line["step"] for line in measured] == list(range(0, 81, 10))
    found = best(measured)
    # Learned by heart, other text becomes less likely.
    assert 0 < found["step"] < 80 and measured[-1]["loss"] > found["loss"] + 0.1
    assert metrics[-1]["step"] == 80
    assert result.tokens == found["tokens"] < metrics[-1]["tokens"]
    trained(replace(CONFIG, tokens=128), "again", LEARNED, result.parameters, HELD_OUT)
    assert lines(tmp_path, "again")[0]["loss"] == found["loss"]


@pytest.mark.slow
def test_patience_ends_a_training_after_so_many_measurements_without_a_better_one(
    whole, trained, tmp_path
):
    result, _, measured = whole
    patient = vary(OVERFITTED, {"evaluation.patience": 2})
    ended, metrics = trained(patient, "ended", LEARNED, held_out=HELD_OUT)
    last = best(measured)["step"] + 20
    assert metrics[-1]["step"] == last == lines(tmp_path, "ended")[-1]["step"]
    assert_same_bits(ended, result)
    # Once more: it is known that it has ended.
    again, _ = trained(patient, "ended", LEARNED, held_out=HELD_OUT)
    assert_same_bits(again, result)


@pytest.mark.slow
@pytest.mark.parametrize("step", [9, 61])
def test_a_training_that_was_killed_ends_with_the_same_best_weights(
    step, whole, trained, tmp_path, monkeypatch
):
    result, _, measured = whole
    config = vary(OVERFITTED, {"runtime.checkpoint_every": 25})
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(Interrupt):
            trained(config, "killed", LEARNED, held_out=HELD_OUT)
    resumed, _ = trained(config, "killed", LEARNED, held_out=HELD_OUT)
    assert_same_bits(resumed, result)
    assert lines(tmp_path, "killed") == measured


@pytest.mark.slow
def test_experts_of_one_program_end_as_they_would_alone(trained, parameters, tmp_path):
    """One ends early, with weights of its best measurement; the other goes on to its end."""
    config = vary(OVERFITTED, {"evaluation.patience": 2})
    texts = {"heart": (LEARNED, HELD_OUT), "sound": (SOURCES, HELD_OUT[:1])}
    alone = {
        name: trained(config, name, ours, held_out=held)[0] for name, (ours, held) in texts.items()
    }
    specs = [
        TrainingSpec(
            label=name,
            start=lambda shardings: jax.device_put(parameters, shardings),
            sources=ours,
            config=vary(config, {"runtime.mesh_expert": 2}),
            held_out=held,
            directory=tmp_path / "both" / name,
        )
        for name, (ours, held) in texts.items()
    ]
    for name, found in zip(texts, train_together(specs, MODEL, TEXT)):
        assert_same_bits(found, alone[name])
        assert lines(tmp_path / "both", name) == lines(tmp_path, name)
    assert alone["heart"].tokens < alone["sound"].tokens


def test_without_held_out_text_the_last_weights_are_the_result(trained, tmp_path):
    one, _ = trained(CONFIG, "one")
    other, _ = trained(vary(CONFIG, {"evaluation.every": 3}), "other")
    assert_same_bits(one, other)
    assert not (tmp_path / "one" / "held_out.jsonl").exists()


def test_only_so_many_tokens_are_read_and_each_language_counts_by_its_share():
    config = vary(CONFIG, {"evaluation.tokens": 40})
    text = HeldOutText(HELD_OUT, config, MODEL, TEXT)
    rows = sum(int((batch["segments"].max(axis=1) > 0).sum()) for batch in text.batches)
    assert rows == 9  # three of 16 tokens for each of three languages
    nats = np.repeat([1.0, 2.0, 4.0], 3) * 10
    line = text.measurement(np.append(nats, np.zeros(7)), np.append(np.full(9, 10.0), np.zeros(7)))
    assert line["loss"] == pytest.approx(0.5 * 1 + 0.3 * 2 + 0.2 * 4)
    assert text.measurement(np.full(16, np.nan), np.ones(16))["loss"] is None


def test_texts_of_one_language_in_several_stores_are_one_figure():
    first, second, third = HELD_OUT
    tag = first.ids.language
    again = replace(second, ids=replace(second.ids, language=tag))
    apart = HeldOutText(HELD_OUT, CONFIG, MODEL, TEXT)
    count = sum(int((batch["segments"].max(axis=1) > 0).sum()) for batch in apart.batches)
    nats, targets = np.linspace(1, 9, count), np.full(count, 3.0)
    bits = apart.measurement(nats, targets)["bits_per_byte"]
    found = HeldOutText([first, again, third], CONFIG, MODEL, TEXT).measurement(nats, targets)
    sizes = [int(s.ids.bytes[s.documents].sum()) for s in (first, second)]
    values = [bits[tag], bits[second.ids.language]]
    assert found["bits_per_byte"] == {
        tag: pytest.approx(np.average(values, weights=sizes)),
        third.ids.language: bits[third.ids.language],
    }


def test_the_best_is_the_earliest_lowest_and_never_the_beginning():
    measured = [{"step": n, "loss": loss} for n, loss in enumerate([1.0, 3.0, None, 2.0, 2.0])]
    assert best(measured)["step"] == 3
    assert best(measured[:1]) is None
    assert without_improvement(measured) == 4
    assert without_improvement([]) == 0


# Which documents are held out


def of_lengths(lengths, hashes):
    lengths = np.asarray(lengths)
    order, stream_ends = shuffled("sv", lengths)
    return TokenizedLanguage(
        language="sv",
        ids=np.zeros(lengths.sum(), np.uint16),
        ends=np.cumsum(lengths),
        bytes=lengths,
        hashes=np.stack([np.asarray(hashes, np.uint64), np.zeros(len(lengths), np.uint64)], axis=1),
        order=order,
        stream_ends=stream_ends,
    )


@pytest.mark.parametrize(
    ("documents", "count"), [(1, 0), (2, 0), (3, 1), (25, 5), (40, 8), (800, 8), (5000, 50)]
)
def test_a_hundredth_is_held_out_and_of_little_text_a_fifth(documents, count):
    hashes = np.random.default_rng(0).permutation(documents)
    found = held_out(of_lengths([7] * documents, hashes), HeldOutConfig())
    assert found.tolist() == sorted(np.flatnonzero(hashes < count))


def test_what_is_held_out_follows_the_text_and_not_its_place():
    draw = np.random.default_rng(1)
    hashes, lengths = draw.permutation(1000), draw.integers(1, 50, 1000)
    chosen = set(hashes[held_out(of_lengths(lengths, hashes), HeldOutConfig())])
    order = draw.permutation(1000)
    again = held_out(of_lengths(lengths[order], hashes[order]), HeldOutConfig())
    assert set(hashes[order][again]) == chosen


def test_no_more_tokens_are_held_out_than_the_limit_or_a_third_of_all():
    ids = of_lengths([60, 50, 40, 30, 20], [0, 1, 2, 3, 4])
    half = HeldOutConfig(share=0.5, most_tokens=115)
    assert held_out(ids, half).tolist() == [0]  # with the next it would be half of the text
    assert held_out(ids, replace(half, most_tokens=55)).tolist() == [1]
    assert held_out(ids, replace(half, most_tokens=10)).tolist() == []
    assert held_out(ids, replace(half, share=0.0)).tolist() == []
    long = of_lengths([1_000_000] + [100] * 24, np.arange(25))
    assert held_out(long, HeldOutConfig()).tolist() == [1, 2, 3, 4]


def test_documents_are_trained_on_or_held_out_and_never_both():
    hashes = np.random.default_rng(2).permutation(100)
    ids = of_lengths([3] * 100, hashes)
    evens = LanguageShare(ids=ids, share=0.7, documents=np.arange(0, 100, 2))
    text = divide([evens, LanguageShare(ids=of_lengths([3], [1000]), share=0.3)], HeldOutConfig())
    training, alone = text.sources
    (measured,) = text.held_out
    assert measured.documents.tolist() == sorted(n for n in range(0, 100, 2) if hashes[n] < 8)
    assert sorted([*training.documents, *measured.documents]) == evens.documents.tolist()
    assert (training.share, measured.share, alone.documents) == (0.7, 0.7, None)


def test_copies_of_held_out_documents_are_never_trained_on():
    """In the same language, where copies are kept, and in another one."""
    hashes = np.repeat(np.arange(50), 3)
    threefold, other = of_lengths([5] * 150, hashes), of_lengths([5] * 80, np.arange(20, 100))
    away = held_out(threefold, HeldOutConfig())
    assert set(hashes[away]) == {0, 1, 2} and len(away) == 9
    sources = [LanguageShare(ids=ids, share=0.5) for ids in (threefold, other)]
    elsewhere = np.asarray([40], np.uint64)
    text = divide(sources, HeldOutConfig(), elsewhere)
    measured = {int(h) for s in text.held_out for h in s.ids.hashes[s.documents, 0]}
    trained = {int(h) for s in text.sources for h in s.ids.hashes[s.documents, 0]}
    assert measured == {0, 1, 2, *range(20, 28)}
    assert trained == set(range(100)) - measured - {40}


@pytest.mark.slow
def test_the_best_weights_are_found_after_a_change_of_precision(trained, tmp_path, monkeypatch):
    """Killed in float32 after its best measurement, and resumed in bfloat16."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 61)
        with pytest.raises(Interrupt):
            trained(OVERFITTED, "killed", LEARNED, held_out=HELD_OUT)
    before = lines(tmp_path, "killed")
    other = vary(OVERFITTED, {"runtime.dtype": "bfloat16", "runtime.moments_dtype": "bfloat16"})
    resumed, _ = trained(other, "killed", LEARNED, held_out=HELD_OUT)
    measured = lines(tmp_path, "killed")
    assert measured[: len(before)] == before and best(measured) in before
    trained(replace(CONFIG, tokens=128), "again", LEARNED, resumed.parameters, HELD_OUT)
    assert lines(tmp_path, "again")[0]["loss"] == best(measured)["loss"]
