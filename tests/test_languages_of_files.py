"""The language of a file: by its name, its folder, its records, or a map."""

import pytest
from small_corpora import HABARI, MANN, lines, texts, write

from clustering.errors import UserError
from xelm.data.contents import contents_of, languages_of
from xelm.data.corpus import Corpus
from xelm.data.path_names import language_in
from xelm.data.reading import Reading, read
from xelm.data.unusable import UnusableRecords


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
