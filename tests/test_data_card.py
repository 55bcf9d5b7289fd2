"""Data cards beside a corpus: which text they are of, and what is wrong with them."""

import json

import pytest

from clustering.errors import UserError
from experts.card import card
from experts.expert import Expert
from experts.registry import Registry
from xelm.data.contents import contents_of
from xelm.data.data_card import DataCard, card_of, read_card
from xelm.data.reading import Reading


def lines(count: int, word: str = "ord") -> str:
    return "".join(json.dumps({"text": f"{word} {n}"}) + "\n" for n in range(count))


@pytest.fixture
def corpus(tmp_path):
    """A corpus with a card for all of it, one for Swedish, and one in an inner folder."""
    folder = tmp_path / "corpus"
    (folder / "dan_Latn").mkdir(parents=True)
    for name, count in {"sv.jsonl": 3, "de.jsonl": 2, "dan_Latn/a.jsonl": 4}.items():
        (folder / name).write_text(lines(count))
    (folder / "data-card.yaml").write_text("licence: CC-BY-4.0\nsource: the web\n")
    (folder / "swe.card.yaml").write_text("licence: CC0-1.0\nconsent: 'the speakers, in 2025'\n")
    (folder / "dan_Latn" / "data-card.yaml").write_text("contact: da@example.org\n")
    return folder


def origins(what, languages=None):
    reading = Reading(contents_of(what, languages))
    list(reading.documents())
    return reading.origins()


def test_the_card_of_the_language_counts_before_that_of_all_and_the_inner_before_the_outer(corpus):
    found = origins(corpus)
    cards = {tag: origin["sources"][0]["card"] for tag, origin in found.items()}
    assert cards == {
        "sv": {"licence": "CC0-1.0", "consent": "the speakers, in 2025"},
        "de": {"licence": "CC-BY-4.0", "source": "the web"},
        "da": {"contact": "da@example.org"},
    }
    assert {tag: origin["files"] for tag, origin in found.items()} == {"sv": 1, "de": 1, "da": 1}
    assert found["da"]["sources"][0]["read"] == 4


def test_cards_are_no_skipped_files_and_change_no_hash(corpus):
    with_cards = contents_of(corpus)
    assert with_cards.skipped == {}
    (corpus / "data-card.yaml").unlink()
    assert contents_of(corpus).fingerprint() == with_cards.fingerprint()


def test_a_card_beside_one_file_is_found(corpus):
    assert origins(corpus / "de.jsonl")["de"]["sources"][0]["card"]["licence"] == "CC-BY-4.0"


def test_text_without_a_card_says_so(tmp_path):
    (tmp_path / "sv.jsonl").write_text(lines(2))
    assert origins(tmp_path)["sv"]["sources"] == [
        {"source": str(tmp_path), "files": 1, "read": 2, "card": None}
    ]


def test_a_description_names_the_card_of_each_source(corpus, tmp_path):
    (tmp_path / "elsewhere.yaml").write_text("usage: research only\n")
    description = tmp_path / "all.yaml"
    description.write_text(
        "sources:\n"
        "  - {path: corpus/sv.jsonl, card: elsewhere.yaml}\n"
        "  - {path: corpus/de.jsonl, language: sv}\n"
    )
    found = origins(description)["sv"]
    assert [(s["read"], s["card"]) for s in found["sources"]] == [
        (3, {"usage": "research only"}),
        (2, {"licence": "CC0-1.0", "consent": "the speakers, in 2025"}),
    ]
    assert found["files"] == 2
    contents = contents_of(description)
    recorded = contents.corpus.to_json()
    assert isinstance(recorded, dict)
    assert recorded["sources"][0].pop("card") == str(tmp_path / "elsewhere.yaml")
    assert contents_of(recorded).fingerprint() == contents.fingerprint()
    (tmp_path / "elsewhere.yaml").unlink()
    with pytest.raises(UserError, match=r"the data card .*elsewhere.yaml of .*sv.jsonl is not the"):
        contents_of(description).check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("license: MIT", "a data card has no 'license'; it has licence, source, consent, usage, c"),
        ("licence: 4", "licence must be a text; got 4"),
        ("licence: [MIT]", r"licence must be a text; got \['MIT'\]"),
        ("licence: ' '", "licence must be a text; got ' '"),
        ("", "must have lines such as 'licence: CC0-1.0'; known are licence, source, consent, us"),
        ("- MIT", "must have lines such as 'licence: CC0-1.0'"),
        ("licence: {", "is not YAML"),
    ],
)
def test_a_broken_card_is_one_line_before_anything_is_read(corpus, text, message):
    (corpus / "data-card.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        contents_of(corpus).check()
    contents_of(corpus, ["sv"]).check()  # of which another card is


def test_spaces_around_a_value_do_not_count(tmp_path):
    (tmp_path / "data-card.yaml").write_text("licence: |\n  CC0-1.0\n")
    assert read_card(tmp_path / "data-card.yaml") == DataCard(licence="CC0-1.0")


def test_a_part_without_a_card_has_none(tmp_path):
    (tmp_path / "sv.jsonl").write_text(lines(1))
    (tmp_path / "no.card.yaml").write_text("licence: MIT\n")
    (part,) = contents_of(tmp_path).parts
    assert card_of(part, "sv") is None
    assert card_of(part, "no") == tmp_path / "no.card.yaml"


def test_the_model_card_shows_what_the_data_cards_say():
    text = {
        "text": "sv",
        "corpus": "texts",
        "files": 1,
        "documents": 20,
        "held_out": 5,
        "tokens": 1234,
        "bytes": 5678,
        "sha256": "a" * 64,
        "sources": [
            {"source": "texts", "files": 1, "read": 25, "card": {"licence": "CC0-1.0"}},
            {"source": "more", "files": 2, "read": 5, "card": None},
        ],
    }
    old = text | {"text": "train", "sources": None, "files": None}
    expert = Expert(name="sv", languages=("sv",), data={"sv": [text, old]})
    page = card(expert, Registry(seed_sha256={}, experts=(expert,)), {}).splitlines()
    counts = "20 documents (5 more held out), 1,234 tokens, 5,678 bytes"
    assert f"| sv: sv | {counts}; SHA-256 {'a' * 64} |" in page
    assert "| sv: texts | licence: CC0-1.0 |" in page
    assert "| sv: more | no data card |" in page
    assert "| sv: texts | not recorded whether it has a data card |" in page
