"""Corpora that a YAML file describes, and the fingerprint of how text is read."""

import json

import pytest
from small_corpora import MANN, lines, texts, write

from clustering.errors import UserError
from xelm.data.contents import contents_of, languages_of
from xelm.data.corpus import Corpus

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
    assert texts(recorded) == wanted
    assert contents_of(recorded).fingerprint() == contents_of(corpus).fingerprint()
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
