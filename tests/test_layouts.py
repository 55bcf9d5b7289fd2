"""Layouts in which corpora are found: which files are read, and which are skipped."""

import bz2
import gzip
import lzma

import pytest
from small_corpora import BOTH, HABARI, MANN, arrow, lines, parquet, texts, write

from clustering.errors import UserError
from xelm.data.contents import contents_of, languages_of
from xelm.data.reading import Reading
from xelm.data.unusable import UnusableRecords

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


def test_hidden_files_are_skipped_and_told(tmp_path):
    fork = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X"
    write(
        tmp_path, {"fr.jsonl": lines({"text": "Le vieil"}), "._fr.jsonl": fork, ".DS_Store": fork}
    )
    assert texts(tmp_path, languages_of(tmp_path)) == {"fr": ["Le vieil"]}
    assert contents_of(tmp_path).skipped == {
        "with a name that begins with a dot": [".DS_Store", "._fr.jsonl"]
    }


def test_files_of_other_languages_are_counted_by_language(tmp_path):
    names = ["de.jsonl", "fr.jsonl", "fr_1.jsonl", "fr_2.jsonl", "sw.jsonl"]
    write(tmp_path, {name: lines(MANN) for name in names})
    reading = Reading(contents_of(tmp_path, ["de"]), UnusableRecords())
    assert len(list(reading.documents())) == 1
    assert reading.table().splitlines()[-1] == (
        "4 files in other languages were skipped: fr (3), sw (1)"
    )


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
