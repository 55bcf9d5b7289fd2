"""Corpora as people have them: what is read as which language and field, and what is skipped."""

import bz2
import gzip
import json
import lzma
import os
from itertools import groupby

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from clustering.errors import UserError
from xelm.data import records
from xelm.data.contents import contents_of, languages_of
from xelm.data.corpus import Corpus
from xelm.data.parts import Part
from xelm.data.path_names import language_in
from xelm.data.reading import Reading, read
from xelm.data.unusable import UnusableRecords


def lines(*records) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)


def parquet(*records) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), sink)
    return sink.getvalue().to_pybytes()


def arrow(*records) -> bytes:
    table = pyarrow.Table.from_pylist(list(records))
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def write(folder, contents: dict[str, bytes]):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def texts(corpus, languages=None) -> dict[str, list[str]]:
    """Language -> texts, all of which are usable; those in other languages are counted."""
    unusable = UnusableRecords()
    documents = sorted(read(corpus, unusable, languages), key=lambda document: document.language)
    assert languages or not unusable
    assert all(reason.endswith("which was not requested") for reason in unusable.counts)
    grouped = groupby(documents, key=lambda document: document.language)
    return {tag: [document.text for document in found] for tag, found in grouped}


HABARI, MANN = {"text": "Habari"}, {"text": "Der alte Mann"}
BOTH = {"de": ["Der alte Mann"], "sw": ["Habari"]}

LAYOUTS = {
    "FineWeb-2": {
        "data/deu_Latn/train/000_00000.parquet": parquet(
            {**MANN, "language": "deu", "language_script": "Latn"}
        ),
        "data/swh_Latn/train/000_00000.parquet": parquet({**HABARI, "language": "swh"}),
        "data/swh_Latn/test/000_00000.parquet": parquet({"text": "of the test"}),
        "data/swh_Latn_removed/train/000_00000.parquet": parquet({"text": "removed"}),
    },
    "mC4": {
        "c4-de.tfrecord-00000-of-01024.json.gz": gzip.compress(lines(MANN)),
        "c4-sw.tfrecord-00000-of-00064.json.gz": gzip.compress(lines({**HABARI, "url": "u"})),
        "c4-sw-validation.tfrecord-00000-of-00001.json.gz": gzip.compress(lines({"text": "v"})),
    },
    "MADLAD-400": {
        "data/de/de_clean_0000.jsonl.gz": gzip.compress(lines(MANN)),
        "data/sw/sw_clean_0000.jsonl.gz": gzip.compress(lines(HABARI)),
        "data/sw/sw_noisy_0000.jsonl.gz": gzip.compress(lines({"text": "noise"})),
    },
    "OSCAR": {
        "de_meta/de_meta_part_1.jsonl": lines({"content": "Der alte Mann", "metadata": {"a": [1]}}),
        "sw_meta/sw_meta_part_1.jsonl": lines({"content": "Habari", "metadata": None}),
    },
    "Wikipedia": {
        "20231101.de/train-00000-of-00001.parquet": parquet({"id": "7", "title": "T", **MANN}),
        "20231101.sw/train-00000-of-00001.parquet": parquet({"id": "8", "title": "T", **HABARI}),
    },
    "Arrow": {
        "de/data-00000-of-00001.arrow": arrow(MANN),
        "de/state.json": b'{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}',
        "de/dataset_info.json": b"{}",
        "sw/data-00000-of-00001.arrow": arrow(HABARI),
    },
    "text": {"de.txt": b"Der alte Mann\n", "sw.txt.xz": lzma.compress(b"Habari\n")},
    "one file": {
        "all.jsonl": lines({**HABARI, "language": "swh"}, {**MANN, "language": "deu_Latn"})
    },
    "one table": {"train.parquet": parquet({**HABARI, "lang": "sw"}, {**MANN, "lang": "de"})},
    "capitals": {"DE.JSONL": lines(MANN), "SW.Json.BZ2": bz2.compress(lines(HABARI))},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_read_as_its_languages(tmp_path, layout):
    write(tmp_path / "mine", LAYOUTS[layout])
    assert texts(tmp_path / "mine", languages_of(tmp_path / "mine")) == BOTH
    assert texts(tmp_path / "mine", ["sw"])["sw"] == ["Habari"]


def test_what_was_read_as_what_is_one_table(tmp_path):
    write(tmp_path, LAYOUTS["FineWeb-2"])
    write(
        tmp_path,
        {
            "data/swh_Latn/train/001_00000.parquet": parquet({"text": "mbili"}, {"text": None}),
            "sw.jsonl": lines({**HABARI, "lang": "fr"}, HABARI),
            "README.md": b"about",
            ".cache/fr.jsonl": lines(MANN),
        },
    )
    reading = Reading(contents_of(tmp_path, ["de", "sw"]), UnusableRecords())
    assert len(list(reading.documents())) == 4  # the one in French is left out
    rows = [" ".join(row.split()) for row in reading.table().splitlines()]
    assert rows == [
        "read from language documents left out",
        "data/deu_Latn/train/000_00000.parquet de 1 0",
        "data/swh_Latn/train/000_00000.parquet and 1 more sw 2 1",
        "sw.jsonl sw 1 1",
        "1 file with a name that begins with a dot was skipped: .cache; "
        "1 file of an unknown format was skipped: README.md; "
        "2 files of a test or validation split were skipped: "
        "data/swh_Latn/test/000_00000.parquet, data/swh_Latn_removed/train/000_00000.parquet",
    ]


def test_the_first_five_files_that_are_not_read_are_named(tmp_path):
    write(tmp_path, {"de.jsonl": lines(MANN)} | {f"{n}.csv": b"" for n in range(7)})
    reading = Reading(contents_of(tmp_path), UnusableRecords())
    assert "7 files of an unknown format were skipped: 0.csv, 1.csv, 2.csv, 3.csv, 4.csv and 2" in (
        reading.table()
    )


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("swh_Latn", "sw"),
        ("deu_Latn_0007", "de"),
        ("c4-sw.tfrecord-00000-of-00256", "sw"),
        ("fr_clean_0000", "fr"),
        ("fr_meta_part_1", "fr"),
        ("20231101.sw", "sw"),
        ("sw-00000-of-00001", "sw"),
        ("pt-PT", "pt-PT"),
        ("20231101.zh-min-nan", "nan"),
        ("20231101.als", None),
        ("kor_Hang", "ko"),
        ("20231101.map-bms", "jv-x-bms"),
        ("20231101.be-x-old", "be-tarask"),
        ("zh-classical", "lzh"),
        ("20231101.simple", "en-simple"),
        ("zh-Hant_0001", "zh-Hant"),
        ("swa_wikipedia_2021_10K-sentences", "sw"),
        ("all", None),
        ("raw_0001", None),
        ("val", None),
        *((word, None) for word in ("new", "ted", "ner", "los", "New")),
        ("20231101.new", "new"),
        ("new_Deva", "new"),
        ("cat_Latn", "ca"),
        ("notes", None),
        ("data-00000-of-00001", None),
        ("000_00000", None),
        ("de-en-ja", None),
        ("sw_notes", None),
    ],
)
def test_a_name_says_a_language_only_if_it_says_nothing_else(name, tag):
    assert language_in(name) == tag


def test_the_more_exact_of_name_and_record_counts(tmp_path):
    records = [{"text": "a", "lang": "srp"}, {"text": "b", "lang": "srp_Latn"}, {"text": "c"}]
    write(
        tmp_path, {"srp_Latn/train/0.jsonl": lines(*records), "srp_Cyrl/0.jsonl": lines(*records)}
    )
    tags = [document.language for document in read(tmp_path / "srp_Latn", UnusableRecords())]
    assert tags == ["sr-Latn"] * 3


def test_a_folder_whose_name_happens_to_be_a_code_gives_way_to_its_records(tmp_path):
    """`can` is Chambri."""
    write(tmp_path, {"can/part_0.jsonl": lines({**HABARI, "language": "sw"})})
    assert texts(tmp_path / "can") == texts(tmp_path) == {"sw": ["Habari"]}
    write(tmp_path, {"can/part_0.jsonl": lines({**HABARI, "language": "can"})})
    assert texts(tmp_path) == {"can": ["Habari"]}


def test_files_of_one_language_under_two_names_are_read_together_and_told(tmp_path):
    write(tmp_path, {"deu.jsonl": lines(MANN), "de_2.jsonl": lines({"text": "und das Meer"})})
    assert languages_of(tmp_path) == ["de"]
    reading = Reading(contents_of(tmp_path, ["de"]), UnusableRecords())
    assert [d.text for d in reading.documents()] == ["und das Meer", "Der alte Mann"]
    rows = [row.split()[:2] for row in reading.table().splitlines()[1:]]
    assert rows == [["de_2.jsonl", "de"], ["deu.jsonl", "de"]]


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


def test_hidden_files_are_skipped_and_told(tmp_path):
    fork = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X"
    write(
        tmp_path, {"fr.jsonl": lines({"text": "Le vieil"}), "._fr.jsonl": fork, ".DS_Store": fork}
    )
    assert texts(tmp_path, languages_of(tmp_path)) == {"fr": ["Le vieil"]}
    assert contents_of(tmp_path).skipped == {
        "with a name that begins with a dot": [".DS_Store", "._fr.jsonl"]
    }


def test_files_of_which_nothing_says_the_language_are_named_with_what_to_do(tmp_path):
    write(tmp_path, {"de.jsonl": lines(MANN), "notes.jsonl": lines(MANN), "old/all.txt": b"a\n"})
    with pytest.raises(UserError) as caught:
        languages_of(tmp_path)
    assert str(caught.value) == (
        "unknown language code 'notes': nothing says the language of notes.jsonl (and 1 more: "
        f"old/all.txt) of {tmp_path}; say it in a YAML file, 'notes: CODE', or 'notes: null' to "
        "leave it out, with --language-map, name the field of the records that says it with "
        "--language-field, or choose with --languages"
    )
    assert texts(tmp_path, ["de"]) == {"de": ["Der alte Mann"]}
    assert contents_of(tmp_path, ["de"]).skipped == {
        "of an unknown language": ["notes.jsonl", "old/all.txt"]
    }


@pytest.mark.parametrize("name", ["my", "cat", "new", "my/train"])
def test_a_corpus_whose_name_happens_to_be_a_code_is_of_no_language_unless_a_map_says_so(
    tmp_path, name
):
    corpus, word = write(tmp_path / name, {"part_0.txt": b"eins\n"}), name.partition("/")[0]
    for path in (corpus, corpus / "part_0.txt"):
        with pytest.raises(UserError, match=r"nothing says the language of part_0\.txt"):
            languages_of(path)
    assert texts(Corpus.of(corpus).with_defaults(languages={word: "de"})) == {"de": ["eins"]}


def test_burmese_and_catalan_are_read_under_their_codes(tmp_path):
    write(tmp_path, {"c/my.txt": b"eins\n", "c/cat/part_0.txt": b"zwei\n"})
    assert texts(tmp_path / "c") == {"ca": ["zwei"], "my": ["eins"]}
    assert texts(tmp_path / "c/my.txt") == {"my": ["eins"]}


def test_a_map_gives_names_their_languages_and_leaves_out(tmp_path):
    write(
        tmp_path / "c",
        {
            "als.jsonl": lines(MANN),
            "german/1.txt": b"zwei\n",
            "notes.jsonl": lines(MANN),
            "old/sw.jsonl": lines(HABARI),
            "all.jsonl": lines({"text": "x", "lang": "Kiswahili"}, {"text": "y", "lang": "??"}),
        },
    )
    languages = {
        "als": "gsw",
        "german": "de",
        "notes": None,
        "old/*": None,
        "Kiswahili": "sw",
        "??": None,
    }
    corpus = Corpus.of(tmp_path / "c").with_defaults(languages=languages)
    assert languages_of(corpus) == ["sw", "gsw", "de"]
    faults = UnusableRecords()
    found = [(document.language, document.text) for document in read(corpus, faults)]
    assert found == [("sw", "x"), ("gsw", "Der alte Mann"), ("de", "zwei")]
    reason = "a language that the map leaves out"
    assert faults.to_json() == {reason: {"count": 1, "first": ["all.jsonl:2 '??'"]}}
    assert contents_of(corpus).skipped == {
        "that the language map leaves out": ["notes.jsonl", "old/sw.jsonl"]
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


def test_files_of_other_languages_are_counted_by_language(tmp_path):
    names = ["de.jsonl", "fr.jsonl", "fr_1.jsonl", "fr_2.jsonl", "sw.jsonl"]
    write(tmp_path, {name: lines(MANN) for name in names})
    reading = Reading(contents_of(tmp_path, ["de"]), UnusableRecords())
    assert len(list(reading.documents())) == 1
    assert reading.table().splitlines()[-1] == (
        "4 files in other languages were skipped: fr (3), sw (1)"
    )


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


@pytest.mark.parametrize("pack", [lzma.compress, bz2.compress])
def test_other_compressions_cut_short_say_so(tmp_path, pack):
    name = f"de.jsonl.{'xz' if pack is lzma.compress else 'bz2'}"
    many = lines(*({"text": os.urandom(16).hex()} for _ in range(100_000)))
    write(tmp_path, {name: pack(many)[: len(pack(many)) // 2]})
    faults = UnusableRecords()
    count = len(list(read(tmp_path, faults)))
    (reason,) = faults.counts
    assert reason.startswith("a damaged file (") and 0 < count < 100_000
    assert faults.places[reason] == [f"{name} after line {count}"] or faults.total() == 2


def test_a_pattern_chooses_folders(tmp_path):
    write(tmp_path, LAYOUTS["FineWeb-2"])
    assert texts(tmp_path / "data" / "*" / "test") == {"sw": ["of the test"]}
    assert texts(f"{tmp_path}/data/deu*") == {"de": ["Der alte Mann"]}
    with pytest.raises(UserError, match=r"corpus .*/nothing\* does not exist"):
        contents_of(f"{tmp_path}/nothing*")


def test_links_are_followed_and_circles_end(tmp_path):
    write(tmp_path, {"there/0.jsonl": lines(HABARI), "c/de.jsonl": lines(MANN)})
    (tmp_path / "c" / "sw").symlink_to(tmp_path / "there")
    (tmp_path / "c" / "again").symlink_to(tmp_path / "c")
    (tmp_path / "c" / "fr.jsonl").symlink_to(tmp_path / "nothing")
    assert texts(tmp_path / "c") == BOTH
    reason = "without content (a broken link or a special file)"
    assert contents_of(tmp_path / "c").skipped == {reason: ["fr.jsonl"]}


DESCRIPTION = """
text_field: content
languages:
  als: gsw
sources:
  - oscar
  - path: books
    language: sw
    unit: file
  - path: more/*.jsonl
    text_field: text
    languages: {notes: null}
"""


def test_a_description_joins_sources(tmp_path):
    write(
        tmp_path,
        {
            "corpus.yaml": DESCRIPTION.encode(),
            "oscar/de_meta/part_1.jsonl": lines({"content": "Der alte Mann", "text": None}),
            "oscar/als_meta/als_meta_part_1.jsonl": lines({"content": "Dr alt"}),
            "books/de/1.txt": b"Sura ya kwanza\n\nHabari",
            "more/als.jsonl": lines({"text": "Dr alt Maa"}),
            "more/notes.jsonl": lines({"text": "n"}),
        },
    )
    corpus = Corpus.of(tmp_path / "corpus.yaml")
    wanted = {
        "de": ["Der alte Mann"],
        "gsw": ["Dr alt", "Dr alt Maa"],
        "sw": ["Sura ya kwanza\n\nHabari"],
    }
    assert texts(corpus) == wanted
    assert languages_of(corpus) == ["gsw", "de", "sw"]
    recorded = json.loads(json.dumps(corpus.pinned().to_json()))
    assert (
        texts(recorded) == wanted
        and contents_of(recorded).fingerprint() == contents_of(corpus).fingerprint()
    )
    assert recorded["sources"][1] == {
        "path": str(tmp_path / "books"),
        **{"language": "sw", "text_field": "content", "languages": {"als": "gsw"}, "unit": "file"},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sources: [a", r"corpus\.yaml is not YAML: "),
        ("- a", r"corpus\.yaml describes no corpus; wanted 'sources:'"),
        ("sources: a", r"sources of .*corpus\.yaml must be a list; got 'a'"),
        ("sources: [{language: sw}]", r"corpus\.yaml: a source is a path, or has one with"),
        ("sources: [{path: a, field: b}]", r"corpus\.yaml: there is no 'field' of a source; there"),
        ("sources: [{path: a, language: klingonish}]", r"unknown language code 'klingonish'"),
        (
            "sources: [{path: a, unit: page}]",
            r"unit must be one of paragraph, line, file; got page",
        ),
        ("sources: [{path: a, text_field: 7}]", r"text_field of a corpus must be a text; got 7"),
        ("languages: {no: nb}\nsources: [a]", r"need quotes, as 'no'; got \{False: 'nb'\}"),
        ("sources: [hf://one]", r"a Hub corpus is hf://owner/dataset"),
        (b"\xff\xfe", r"corpus\.yaml is not YAML: "),
    ],
)
def test_a_description_that_is_none_is_one_line(tmp_path, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    write(tmp_path, {"corpus.yaml": content})
    with pytest.raises(UserError, match=message) as caught:
        Corpus.of(tmp_path / "corpus.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"missing\.yaml cannot be read: No such file"):
        Corpus.of(tmp_path / "missing.yaml")


def test_the_fingerprint_covers_how_text_is_read(tmp_path):
    write(tmp_path / "c", {"a/sw.jsonl": lines({"text": "a", "body": "b"})})
    plain = Corpus.of(tmp_path / "c")
    variants = [
        plain,
        plain.with_defaults(text_field="body"),
        plain.with_defaults(language="fr"),
        plain.with_defaults(languages={"sw": "fr"}),
        plain.with_defaults(language_field="x"),
    ]
    found = [contents_of(corpus).fingerprint() for corpus in variants]
    (tmp_path / "c" / "a").rename(tmp_path / "c" / "b")
    assert len({*found, contents_of(plain).fingerprint()}) == len(found) + 1
    # The language of a folder's name counts, though no name within it changes.
    write(tmp_path, {"de/1.jsonl": lines(MANN), "sw/1.jsonl": lines(MANN)})
    assert contents_of(tmp_path / "de").fingerprint() != contents_of(tmp_path / "sw").fingerprint()


FINEWEB = {"deu_Latn": [MANN], "swh_Latn": [HABARI], "swh_Latn_removed": [{"text": "x"}]}


@pytest.fixture
def fineweb(monkeypatch):
    """The Hub with a data set of three configurations; returns the commit, which may be changed."""
    import datasets
    import huggingface_hub

    state = {"sha": "a" * 40}

    def dataset_info(self, name, *, revision=None):
        return huggingface_hub.DatasetInfo(id=name, sha=state["sha"])

    def load_dataset(name, config, *, split, streaming, revision):
        assert (name, split, streaming, revision) == ("owner/web", "train", True, state["sha"])
        return FINEWEB[config]

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = lambda name, revision: sorted(FINEWEB)  # noqa: E731
    monkeypatch.setattr(datasets, "get_dataset_config_names", names)
    return state


def test_configurations_of_a_data_set_are_languages(fineweb):
    assert texts("hf://owner/web") == BOTH
    assert texts("hf://owner/web", ["sw"]) == {"sw": ["Habari"]}
    assert texts("hf://owner/web/swh_Latn_removed") == {"sw": ["x"]}
    assert languages_of("hf://owner/web/swh_Latn") == ["sw"]
    with pytest.raises(UserError, match="name the languages to take from hf://owner/web with"):
        languages_of("hf://owner/web")
    with pytest.raises(UserError, match="hf://owner/web has no file of fr"):
        contents_of("hf://owner/web", ["sw", "fr"])


def test_a_data_set_is_recorded_with_its_commit_and_stays_at_it(fineweb):
    pinned = Corpus.of("hf://owner/web").pinned()
    assert pinned.to_json() == f"hf://owner/web@{'a' * 40}"
    before = contents_of("hf://owner/web", ["sw"]).fingerprint()
    assert contents_of(pinned, ["sw"]).fingerprint() == before
    fineweb["sha"] = "b" * 40
    assert contents_of("hf://owner/web", ["sw"]).fingerprint() != before
    assert contents_of(pinned, ["sw"]).fingerprint() == before


def test_a_folder_of_the_name_of_a_data_set_is_not_taken_for_it(tmp_path, monkeypatch):
    write(tmp_path, {"owner/web/de.jsonl": lines(MANN)})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="there is a folder owner/web here; give --corpus owner/web"
    ):
        list(read("hf://owner/web", UnusableRecords()))


def test_configurations_that_name_no_language_have_to_be_chosen(fineweb, monkeypatch):
    import datasets

    names = ["sample-10BT", "sample-100BT"]
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name, revision: names)
    with pytest.raises(UserError, match=r"name one of sample-10BT, sample-100BT, as in hf://owner"):
        contents_of("hf://owner/web")
