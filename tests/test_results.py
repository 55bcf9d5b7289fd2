"""Reading what was evaluated: whatever is damaged is a user's mistake, not a traceback."""

import pytest

from clustering.errors import UserError
from clustering.files import write_json
from xelm import tables
from xelm.evaluation.results import Row
from xelm.runs.results import read_results
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
