"""Reading what was evaluated: whatever is damaged is a user's mistake, not a traceback."""

import pytest

from clustering.errors import UserError
from clustering.files import read_json, write_json
from experts.expert import Expert
from experts.registry import Registry
from xelm import tables
from xelm.data.text_stats import TextStats
from xelm.evaluation.results import Results, Row
from xelm.runs.results import read_results, write_results
from xelm.runs.run import Run

ROW = {
    "system": "seed",
    "routing": None,
    "language": "en",
    "documents": 2,
    "tokens": 10,
    "bytes": 40,
    "nll": 20.0,
}


def run_with(tmp_path, rows):
    (tmp_path / "results").mkdir()
    record = {"format": 1, "context_length": 8, "stride": 8, "rows": rows}
    write_json(tmp_path / "results" / "results.json", record)
    return Run(directory=tmp_path, record={})


def test_rows_are_read_and_before_an_evaluation_there_are_none(tmp_path):
    nothing = read_results(Run(directory=tmp_path, record={}))
    assert (nothing.record, nothing.rows, nothing.summaries) == ({}, [], ())
    found = read_results(run_with(tmp_path, [ROW]))
    assert found.record["format"] == 1 and found.rows == [Row(**ROW)]


@pytest.mark.parametrize(
    "change", [{"nll": None}, {"tokens": 0}, {"nll": 1e9}, {"nll": -1.0}, {"bytes": 0}]
)
def test_numbers_that_cannot_be_are_damage(tmp_path, change):
    with pytest.raises(UserError, match=r"results\.json is damaged .*; run xelm evaluate again"):
        read_results(run_with(tmp_path, [ROW | change]))


def test_a_row_without_a_field_is_damage(tmp_path):
    missing = {name: value for name, value in ROW.items() if name != "tokens"}
    with pytest.raises(UserError, match=r"is damaged .*'tokens'"):
        read_results(run_with(tmp_path, [missing]))


def test_the_default_routing_is_the_first_of_the_printed_table(tmp_path):
    routings = (None, "language", "learned")
    rows = [ROW | {"routing": r, "system": "ensemble" if r else "seed"} for r in routings]
    shown = tables.results(read_results(run_with(tmp_path, rows)), routings[1:], ["en"])
    heads = shown.splitlines()[1].split("  ")
    assert [head.strip() for head in heads if head.strip()] == [
        *("seed", "by learned", "true language")
    ]


def test_an_expert_that_was_measured_on_its_own_language_alone_has_a_column(tmp_path):
    rows = [ROW, ROW | {"language": "sv"}, ROW | {"language": "sv", "system": "sv", "nll": 10.0}]
    shown = tables.results(read_results(run_with(tmp_path, rows)), ["language"], ["en"])
    table = shown.partition("bits/B by expert")[2].splitlines()
    assert table[0].split() == ["seed", "sv"]
    assert [line.split()[-2:] for line in table[1:3]] == [["0.721*", "-"], ["0.721", "0.361*"]]


def test_an_expert_that_was_removed_while_it_was_measured_is_in_no_table(tmp_path, capsys):
    hashes = {"x": "1" * 64}
    names = {"a": "en", "b": "de", "c": "fr"}
    experts = [Expert(name=name, languages=(tag,)) for name, tag in names.items()]
    registry = Registry(seed_sha256={}).add(*experts)
    for name in names:
        registry = registry.publish(name, 1, sha256=hashes, tokens=1)
    measured = registry.published()
    registry = registry.retire_expert("b").remove("b", "2026-11-30T08:00:00+00:00")
    registry.rename({"c": "d"}).save(tmp_path)
    rows = [Row(**ROW | {"system": name}) for name in ("seed", "a", "b", "c")]
    run, options = Run(directory=tmp_path, record={}), {"context_length": 8, "stride": 8}
    counts = ("documents", "tokens", "bytes", "characters", "visible_characters")
    counts = dict.fromkeys((*counts, "unknown_characters", "byte_tokens", "duplicates"), 9)
    results = Results(rows=rows, texts={"en": TextStats(language="en", **counts)})
    found = write_results(run, "corpus", options, results, measured)
    kept = read_json(tmp_path / "results/results.json")
    assert [row.system for row in found.rows] == ["seed", "a", "d"]
    assert [row["system"] for row in kept["rows"]] == ["seed", "a", "d"]
    assert kept["removed"] == ["b"]
    assert "changed while they were measured: b, c" in capsys.readouterr().err
