"""What a training costs is told before it starts, and by a dry run alone."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from shared import documents_of, snapshot
from small_training import CONFIG, MODEL, SHARES, SOURCES, source

from clustering.errors import UserError
from xelm.data.rows import LanguageRows
from xelm.data.text_format import TextFormat
from xelm.presets import quickstart
from xelm.progress import duration
from xelm.runs import budget
from xelm.runs.budget import Plan, check_disk, needed_bytes, passes, plan, table, warnings
from xelm.runs.run import open_run
from xelm.runs.train import plans_of
from xelm.settings import vary
from xelm.training import rate
from xelm.training.flops import of_a_token
from xelm.training.metrics import read_metrics

UNMEASURED = ("--set", "gate.worse=null")
"""Publishes an expert of one document, of which nothing is held out."""
PLAN = Plan(
    name="sv",
    part="grow",
    tokens=250_000,
    steps=488,
    passes={"sv": 106.4, "de": 1.23},
    seconds=None,
    basis="unknown",
    checkpoint_bytes=3_000_000,
    model_bytes=1_000_000,
)


def few(folder, corpus, count):
    """So many documents of one more language."""
    texts = documents_of(corpus, "pt")[:count]
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "pt.jsonl").write_text("".join(lines))
    return folder


def test_passes_are_the_rows_that_are_read_over_the_rows_there_are():
    found = passes(SOURCES, CONFIG)
    for one in SOURCES:
        rows = LanguageRows(one, CONFIG, TextFormat(start_id=1, end_id=2))
        tag = one.ids.language
        # 20 steps of 8 rows, of which each language has its share.
        assert found[tag] == pytest.approx(20 * 8 * SHARES[tag] / len(rows))


def test_texts_of_one_language_in_several_stores_are_counted_together():
    first, second = (replace(source("sw", documents=n, length=64), share=0.5) for n in (25, 75))
    found = passes([first, second], quickstart().grow)
    whole = passes([replace(source("sw", documents=100, length=64), share=1.0)], quickstart().grow)
    assert found["sw"] == pytest.approx(whole["sw"], rel=0.05)


def test_25_sentences_are_passed_over_more_than_a_hundred_times_by_the_quickstart():
    # 25 documents of 64 tokens and the two that frame each: 13 rows of 128.
    sources = [
        replace(source("sw", documents=25, length=64), share=0.75),
        replace(source("de", documents=2500, length=64), share=0.25),
    ]
    config = quickstart().grow
    found = passes(sources, config)
    assert config.steps * config.batch_size * 0.75 == 1464
    assert found["sw"] == pytest.approx(1464 / 13) and found["de"] < 1
    (line,) = warnings([replace(PLAN, passes=found)])
    assert "sw 113." in line


def test_more_than_four_passes_are_a_warning_with_language_and_number():
    (line,) = warnings([PLAN])
    assert line.startswith("sv: passes over the same text: sv 106. More than 4 teach little")
    assert "grow --tokens N" in line and "de" not in line.split(".")[0]
    assert warnings([replace(PLAN, passes={"sv": 4.0, "de": 1.0})]) == []
    assert "1.2 to 106" in table([PLAN])


def test_a_grown_language_of_few_documents_is_told_by_its_passes_before_it_is_trained(
    xelm, copy, tmp_path
):
    corpus = few(tmp_path / "few", copy.corpus, count=1)
    before = snapshot(copy.directory)
    arguments = ("grow", copy.directory, "--language", "pt", "--corpus", corpus, *UNMEASURED)
    told = xelm(*arguments, "--dry-run")
    assert told.code == 0, told.err
    assert snapshot(copy.directory) == before
    assert "pt@v1 would start from en-es@v1; nothing was changed" in told.out
    made = xelm(*arguments)
    assert made.code == 0, made.err
    ids = open_run(copy.directory).store("pt").languages["pt"]
    rows = -(-(int(ids.stream_ends[-1]) - 1) // 32)
    # grow.tokens=1024 in rows of 32, of which donor_share=.25 is of the parent's languages.
    times = 1024 / 32 * 0.75 / rows
    shown = f"{times:.0f}" if times >= 10 else f"{times:.1f}"
    assert times > 4
    for outcome in (told, made):
        assert f"pt: passes over the same text: pt {shown}. More than 4" in outcome.err
    (line,) = [line for line in told.out.splitlines() if line.startswith("pt  ") and "was" in line]
    assert "as fast as" in line and "was here" in line and f"to {shown}" in line
    assert made.err.index(line.split()[0]) < made.err.index("100%")


def test_the_advice_to_grow_on_fewer_tokens_can_be_followed(xelm, copy, tmp_path):
    corpus = few(tmp_path / "few", copy.corpus, count=1)
    arguments = ("grow", copy.directory, "--language", "pt", "--corpus", corpus, *UNMEASURED)
    told = xelm(*arguments, "--dry-run")
    assert "begin on fewer tokens (xelm grow --tokens N, or --set grow.max_passes=4)" in (told.err)
    fewer = ("--set", "grow.tokens=256")
    rows = {
        line.split()[0]: line
        for line in xelm(*arguments, *fewer, "--dry-run").out.splitlines()
        if line
    }
    assert rows["pt"].split()[1:3] == ["256", "2"]
    limited = xelm(*arguments, "--set", "grow.max_passes=4", "--dry-run", "--json").json()
    (training,) = limited["trainings"]
    assert training["steps"] < 8 and 2 < max(training["passes"].values()) <= 4
    none = xelm(*arguments, "--set", "grow.max_passes=.01")
    assert none.code == 2 and "raise grow.max_passes" in none.err
    made = xelm(*arguments, "--set", "grow.max_passes=4")
    assert made.code == 0, made.err
    assert "passes over the same text" not in made.err
    expert = open_run(copy.directory).registry().expert("pt")
    (last,) = read_metrics(expert.directory(copy.directory) / "metrics.jsonl")[-1:]
    assert last["step"] == training["steps"]
    assert expert.settings == {"grow.max_passes": 4.0}
    card = (expert.directory(copy.directory) / "README.md").read_text()
    assert "grow.max_passes=4" in card


def test_a_growth_goes_on_with_the_tokens_it_began_with(xelm, copy):
    arguments = ("grow", copy.directory, "--language", "pt", "--corpus", copy.corpus)
    with pytest.MonkeyPatch.context() as patch:

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        patch.setattr("xelm.runs.train.train_checkpoints", interrupt)
        assert xelm(*arguments, "--set", "grow.tokens=512").code == 130
    for dry in ([], ["--dry-run"]):
        for setting, value in (("grow.tokens=256", 256), ("grow.max_passes=2", 2.0)):
            name = setting.partition("=")[0]
            before = {"grow.tokens": 512, "grow.max_passes": None}[name]
            refused = xelm(*arguments, "--set", setting, *dry)
            assert refused.code == 2
            assert (
                f"pt@v1 is in training already, with {name}={before}; got {value}. Go on without "
                f"it, or give it up with: xelm discard {copy.directory} pt"
            ) in refused.err
    same = xelm(*arguments, "--set", "grow.tokens=512", "--dry-run", "--json").json()
    assert same["trainings"][0]["tokens"] == 512
    assert xelm(*arguments).code == 0
    expert = open_run(copy.directory).registry().expert("pt")
    (last,) = read_metrics(expert.directory(copy.directory) / "metrics.jsonl")[-1:]
    assert last["step"] == 512 // 128 and expert.settings == {"grow.tokens": 512}


def test_trainings_of_a_run_are_given_fewer_tokens_by_init():
    for part, setting in (("seed", "seed"), ("experts", "experts"), ("dense", "experts")):
        (line,) = warnings([replace(PLAN, part=part)])
        assert line.endswith(f"make the RUN with fewer tokens (xelm init --set {setting}.tokens=N)")


def test_a_dry_run_of_init_tells_and_writes_nothing(xelm, tiny_corpus, tiny_settings, tmp_path):
    arguments = ("--corpus", tiny_corpus, "--languages", "en,de", *tiny_settings())
    outcome = xelm("init", tmp_path / "RUN", *arguments, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert list(tmp_path.iterdir()) == []
    lines = {line.split()[0]: line for line in outcome.out.splitlines() if line}
    assert lines["seed"].split()[1:3] == ["2,048", "16"]
    assert lines["experts"].split()[1:3] == ["4,096", "32"]
    assert "estimated from one layer's forward and backward pass" in lines["seed"]
    assert "  about " in lines["seed"] and "  about " in lines["experts"]
    assert "0.0%" in lines["en"]


def test_a_first_training_takes_as_long_as_its_positions_at_the_estimated_rate(
    initialised, monkeypatch
):
    run, config = open_run(initialised[0]), CONFIG
    monkeypatch.setattr(rate, "estimated_rate", lambda model, config: 40.0)
    monkeypatch.setattr(budget, "_measured", lambda *_: None)
    found = plan(run, "new", "grow", SOURCES, config, MODEL)
    assert found.seconds == config.steps * config.tokens_per_step / 40
    assert found.estimated
    assert found.basis == "estimated from one layer's forward and backward pass, measured here"
    assert f"  about {duration(found.seconds)}, estimated" in table([found])


@pytest.mark.parametrize("causal", [True, False])
def test_the_estimated_rate_is_that_of_operations_in_one_layer(causal):
    model = replace(MODEL, layer_count=6, causal=causal)
    clock = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0])  # passes of 2, 1 and 4 seconds
    found = rate.estimated_rate(model, CONFIG, lambda: next(clock))
    one = of_a_token(replace(model, layer_count=1), CONFIG.sequence_length)
    whole = of_a_token(model, CONFIG.sequence_length)
    assert whole > 2 * one
    assert found == pytest.approx(CONFIG.batch_size * CONFIG.sequence_length * one / 2 / whole)


def test_large_layers_are_measured_on_few_and_short_rows():
    large = replace(MODEL, width=4096, feedforward_width=11008, head_count=32, head_size=128)
    config = replace(CONFIG, sequence_length=512, batch_size=8)
    rows, length = rate._size(replace(large, layer_count=1), config)
    assert rows == 1 and length < 512
    assert rate._size(MODEL, CONFIG) == (CONFIG.batch_size, CONFIG.sequence_length)


def test_a_dry_run_of_train_tells_the_time_of_one_that_was_measured(xelm, initialised, tmp_path):
    directory = tmp_path / "RUN"
    shutil.copytree(initialised[0], directory)
    before = snapshot(directory)
    outcome = xelm("train", directory, "--dense", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert snapshot(directory) == before
    run = open_run(directory)
    (dense,) = plans_of(run, dense=True)
    assert dense.basis == "as fast as seed was here" and "as fast as seed" in outcome.out
    lines = read_metrics(run.seed / "metrics.jsonl")
    tokens = [b["tokens"] - a["tokens"] for a, b in zip([{"tokens": 0}, *lines], lines)]
    seconds = sum(some / line["tokens_per_second"] for some, line in zip(tokens, lines))
    # Twice as many steps in all as the seed has.
    assert dense.seconds == pytest.approx(2 * seconds)


def test_what_cannot_fit_on_the_disk_is_refused_before_it_starts(
    xelm, initialised, tmp_path, monkeypatch
):
    directory = tmp_path / "RUN"
    shutil.copytree(initialised[0], directory)
    before = snapshot(directory)
    (dense,) = plans_of(open_run(directory), dense=True)
    usage = SimpleNamespace(free=dense.disk_bytes - 1)
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda path: usage)
    outcome = xelm("train", directory, "--dense")
    assert outcome.code == 2
    assert "dense would write up to" in outcome.err and "make room" in outcome.err
    assert snapshot(directory) == before
    usage.free += 1
    check_disk(directory, [dense])
    # Nothing is there yet of a RUN that is to be made.
    check_disk(tmp_path / "none" / "RUN", [dense])
    usage.free = 0
    with pytest.raises(UserError, match="has 0 B of disk left"):
        check_disk(tmp_path / "none" / "RUN", [dense])


def test_trainings_one_after_the_other_need_the_checkpoints_of_one(tmp_path):
    two = [PLAN, replace(PLAN, name="da", checkpoint_bytes=5_000_000)]
    assert needed_bytes(tmp_path, two) == 2_000_000 + 5_000_000
    assert needed_bytes(tmp_path, two, together=2) == 2_000_000 + 8_000_000
    # What is written already needs no room any more.
    checkpoints = tmp_path / "train" / "da" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "state").write_bytes(b"0" * 4_000_000)
    assert needed_bytes(tmp_path, two) == 2_000_000 + 3_000_000


@pytest.mark.parametrize(
    ("changes", "bytes_a_parameter"),
    [
        # 20 steps, saved after every 6: two are kept and the best, and one is being written
        ({}, 4 * (4 + 8)),
        ({"runtime.moments_dtype": "bfloat16"}, 4 * (4 + 4)),
        ({"optimizer.name": "adafactor"}, 4 * (4 + 4)),
        ({"optimizer.name": "adafactor", "optimizer.beta1": 0.0}, 4 * 4),
        ({"runtime.checkpoint_every": 20}, 4 * (4 + 8)),
        ({"runtime.keep_every": 12}, 5 * (4 + 8)),
    ],
)
def test_checkpoints_are_of_masters_and_averages(initialised, changes, bytes_a_parameter):
    run = open_run(initialised[0])
    config = vary(CONFIG, changes)
    found = plan(run, "new", "grow", SOURCES, config, MODEL, estimate=False)
    assert found.checkpoint_bytes == bytes_a_parameter * MODEL.parameter_count
    assert found.model_bytes == 4 * MODEL.parameter_count
    assert found.seconds is None and found.basis.startswith("unknown")
