"""Formats of files of text: what is a document in each, and what becomes of damaged ones."""

import bz2
import gzip
import json
import lzma
import os
from functools import partial

import pytest
from small_corpora import HABARI, MANN, arrow, lines, parquet, texts, write

from clustering.errors import UserError
from xelm.data import records
from xelm.data.contents import contents_of, languages_of
from xelm.data.corpus import Corpus
from xelm.data.reading import read
from xelm.data.unusable import UnusableRecords


@pytest.mark.parametrize(
    "name", ["fr.jsonl", "fr.parquet", "fr/data.arrow", "fr.txt", "FR.JSON.GZ"]
)
def test_a_language_whose_only_file_is_empty_is_named_with_it(tmp_path, name):
    write(tmp_path, {"de.jsonl": lines(MANN), name: b""})
    wanted = f"the corpus has no text in fr: {name} has 0 bytes"
    for ask in (languages_of, lambda corpus: contents_of(corpus, ["de", "fr"])):
        with pytest.raises(UserError) as caught:
            ask(tmp_path)
        assert str(caught.value) == wanted
    assert texts(tmp_path, ["de"]) == {"de": ["Der alte Mann"]}


def test_an_empty_file_beside_others_of_its_language_is_a_fault_of_it(tmp_path):
    contents = {"de.jsonl": lines(MANN), "de_1.jsonl": b"", "de_2.jsonl.gz": gzip.compress(b"")}
    write(tmp_path, contents | {"de_3.parquet": b"", "de_4.arrow": b"", "de_5.txt.xz": b""})
    faults = UnusableRecords()
    assert languages_of(tmp_path) == ["de"]
    assert [document.text for document in read(tmp_path, faults, ["de"])] == ["Der alte Mann"]
    assert faults.to_json() == {
        "an empty file": {"count": 5, "first": ["de_1.jsonl", "de_2.jsonl.gz", "de_3.parquet"]}
    }


def test_fields_may_have_any_names(tmp_path):
    record = {"body": "Habari", "tongue": "swh", "text": None, "lang": "de"}
    write(tmp_path, {"a.jsonl": lines(record), "b.parquet": parquet(record)})
    corpus = Corpus.of(tmp_path).with_defaults(text_field="body", language_field="tongue")
    assert texts(corpus, languages_of(corpus)) == {"sw": ["Habari", "Habari"]}


def test_records_of_any_types_are_read_one_by_one(tmp_path):
    """A reader that makes a table of them stops at the second."""
    records = [{"text": "a", "id": "0", "meta": {"u": [1]}}, {"text": "b", "id": 7, "meta": "x"}]
    write(tmp_path, {"sw.jsonl": lines(*records, {"text": 7}, {"text": "c", "meta": [None]})})
    faults = UnusableRecords()
    assert [document.text for document in read(tmp_path, faults)] == ["a", "b", "c"]
    assert faults.to_json() == {'no "text"': {"count": 1, "first": ["sw.jsonl:3"]}}


TEXT = "Erste Zeile\nzweite Zeile\n\n\u3000\nDritte Zeile\r\n\r\n"


@pytest.mark.parametrize(
    ("content", "unit", "documents"),
    [
        (TEXT, None, ["Erste Zeile\nzweite Zeile", "Dritte Zeile"]),
        ("Erste Zeile\nzweite Zeile\n", None, ["Erste Zeile", "zweite Zeile"]),
        (TEXT, "line", ["Erste Zeile", "zweite Zeile", "Dritte Zeile"]),
        (TEXT, "paragraph", ["Erste Zeile\nzweite Zeile", "Dritte Zeile"]),
        ("eins\nzwei\n", "paragraph", ["eins\nzwei"]),
        ("\ufeffeins\n\nzwei", "file", ["eins\n\nzwei"]),
        ("eins\r\nzwei\r\n\r\ndrei", None, ["eins\nzwei", "drei"]),
        ("eins\rzwei\r\rdrei", None, ["eins\nzwei", "drei"]),
        ("eins\rzwei\r", None, ["eins", "zwei"]),
        ("eins\r\nzwei\rdrei", "file", ["eins\nzwei\ndrei"]),
    ],
)
def test_text_files_are_read_by_paragraph_line_or_file(tmp_path, content, unit, documents):
    write(tmp_path, {"de.txt": content.encode()})
    assert texts(Corpus.of(tmp_path).with_defaults(unit=unit)) == {"de": documents}


def test_what_is_broken_in_a_text_file_has_the_place_of_its_paragraph(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_LINE_BYTES", 50)
    paragraphs = [b"eins", b"caf\xe9", b"lang\n" * 20, b"x" * 70, b"zwei"]
    write(tmp_path, {"de.txt": b"\n\n".join(paragraphs)})
    faults = UnusableRecords()
    assert [document.text for document in read(tmp_path, faults)] == ["eins", "zwei"]
    assert faults.to_json() == {
        "bytes that are not UTF-8": {"count": 1, "first": ["de.txt:3"]},
        "a document over 64 MiB": {"count": 1, "first": ["de.txt:5"]},
        "a line over 64 MiB": {"count": 1, "first": ["de.txt:27"]},
    }


def test_a_json_array_over_lines_is_one_fault(tmp_path):
    write(tmp_path, {"de.json": json.dumps([MANN, MANN], indent=1).encode()})
    faults = UnusableRecords()
    assert list(read(tmp_path, faults)) == []
    reason = "a JSON array over several lines; wanted one record a line"
    assert faults.to_json() == {reason: {"count": 1, "first": ["de.json:1"]}}


def test_a_data_set_saved_by_datasets_is_read_as_it_lies(tmp_path):
    import datasets

    rows = [{**HABARI, "lang": "sw"}, {**MANN, "lang": "de"}]
    made = datasets.Dataset.from_list(rows * 2)
    made.save_to_disk(str(tmp_path / "disk"), num_shards=2)
    both = {"de": ["Der alte Mann"] * 2, "sw": ["Habari"] * 2}
    assert texts(tmp_path / "disk", languages_of(tmp_path / "disk")) == both
    assert contents_of(tmp_path / "disk").skipped == {}
    (tmp_path / "disk" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"state\.json names data-00001-of-00002\.arrow, which is"):
        contents_of(tmp_path / "disk")


def test_a_data_set_with_splits_gives_that_for_training(tmp_path):
    import datasets

    splits = {"train": [HABARI], "test": [{"text": "of the test"}]}
    made = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})
    made.save_to_disk(str(tmp_path / "sw"))
    assert texts(tmp_path / "sw") == {"sw": ["Habari"]}
    assert texts(tmp_path / "sw" / "test") == {"sw": ["of the test"]}


def test_damaged_arrow_gives_what_it_holds_and_says_so(tmp_path):
    whole = arrow(*[{"text": f"text {number}"} for number in range(100)])
    write(tmp_path, {"sw.arrow": whole[: len(whole) // 2], "de.jsonl": lines(MANN)})
    faults = UnusableRecords()
    found = [d.text for d in read(tmp_path, faults) if d.language == "sw"]
    assert 10 < len(found) < 90 and found == [f"text {number}" for number in range(len(found))]
    (reason,) = faults.counts
    assert reason.startswith("a damaged file (")
    assert faults.places == {reason: [f"sw.arrow after row {len(found)}"]}


@pytest.mark.parametrize(
    ("ending", "pack"), [("xz", partial(lzma.compress, preset=0)), ("bz2", bz2.compress)]
)
def test_other_compressions_cut_short_say_so(tmp_path, ending, pack):
    name = f"de.jsonl.{ending}"
    packed = pack(lines(*({"text": os.urandom(16).hex()} for _ in range(60_000))))
    write(tmp_path, {name: packed[: len(packed) // 2]})
    faults = UnusableRecords()
    count = len(list(read(tmp_path, faults)))
    (reason,) = faults.counts
    assert reason.startswith("a damaged file (") and 0 < count < 60_000
    assert faults.places[reason] == [f"{name} after line {count}"] or faults.total() == 2
