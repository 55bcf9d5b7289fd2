"""Measures of text read a file of several languages once, and no further than they need."""

import numpy as np
import pytest
from small_corpora import HABARI, MANN, lines, write

from xelm.data.parts import Part


@pytest.mark.parametrize("measure", ["words", "characters"])
def test_one_reading_of_a_file_serves_all_its_languages(tmp_path, monkeypatch, measure):
    from xelm.runs.distances import Sources, measured

    tags, number = ["de", "fr", "sw", "tr"], 30
    by_language = {
        tag: [{"text": f"{tag} gleich {n % (place + 2)}a"} for n in range(number)]
        for place, tag in enumerate(tags)
    }
    mixed = [
        {**by_language[tag][n], "language": tag} for n in range(number) for tag in reversed(tags)
    ]
    write(tmp_path / "one", {"all.jsonl": lines(*mixed, {"text": 7})})
    write(tmp_path / "each", {f"{tag}.jsonl": lines(*by_language[tag]) for tag in tags})
    read_lines = []

    def counted(texts, faults, whole=Part.all_documents):
        read_lines.append(0)
        for document in whole(texts, faults):
            read_lines[-1] += 1
            yield document

    monkeypatch.setattr(Part, "all_documents", counted)
    monkeypatch.setattr("xelm.runs.distances._HELD_CHARACTERS", 100)  # several pieces a language
    one = measured(measure, tags, Sources(corpus=tmp_path / "one"))
    assert read_lines == [4 * number]
    each = measured(measure, tags, Sources(corpus=tmp_path / "each"))
    assert read_lines[1:] == [number] * 4
    np.testing.assert_array_equal(one.values, each.values)
    assert one.parameters["units"] == each.parameters["units"]
    assert len({*one.values[np.triu_indices(4, 1)].round(6)}) > 2
    # No further than the languages need.
    few = measured(measure, tags, Sources(corpus=tmp_path / "one", documents=5))
    assert read_lines[5:] == [4 * 5]
    few_each = measured(measure, tags, Sources(corpus=tmp_path / "each", documents=5))
    np.testing.assert_array_equal(few.values, few_each.values)


def test_what_is_unusable_of_a_file_of_many_languages_is_counted_once(tmp_path):
    from xelm.runs.distances import Sources, measured

    records = [{**HABARI, "language": "sw"}, {**MANN, "language": "de"}, {"text": ""}, {"text": 7}]
    write(tmp_path, {"all.jsonl": lines(*records), "fr.jsonl": lines({"text": "Le"}, {"id": 1})})
    found = measured("words", ["sw", "de", "fr"], Sources(corpus=tmp_path))
    left_out = {
        reason: fault["count"] for reason, fault in found.parameters["records_left_out"].items()
    }
    assert left_out == {"empty text": 1, 'no "text"': 2}
