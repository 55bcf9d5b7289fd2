"""Language codes as users write them become one canonical tag."""

import pytest

from clustering import languages
from clustering.errors import UserError


@pytest.mark.parametrize(
    ("given", "tag"),
    [
        ("en", "en"),
        ("EN", "en"),
        ("iw", "he"),
        ("swh", "sw"),
        ("swa", "sw"),
        ("cmn", "zh"),
        ("zho", "zh"),
        ("azj", "az"),
        ("pes", "fa"),
        ("arb", "ar"),
        ("ger", "de"),
        ("eng_Latn", "en"),
        ("zho_Hans", "zh-Hans"),
        ("pt_br", "pt-BR"),
        ("sr-Cyrl", "sr-Cyrl"),
        # Languages in their own right keep their code, though a macrolanguage covers them.
        ("yue", "yue"),
        ("arz", "arz"),
        ("nn", "nn"),
        ("nb", "nb"),
    ],
)
def test_codes_of_one_language_have_one_tag(given, tag):
    assert languages.canonical(given) == tag
    assert languages.canonical(tag) == tag


@pytest.mark.parametrize(
    ("given", "suggestion"),
    [("jp", "ja (Japanese)"), ("gr", "el (Greek)"), ("Swahili", "sw (Swahili)"), ("enq1", "")],
)
def test_an_unknown_code_is_named_with_what_was_probably_meant(given, suggestion):
    with pytest.raises(UserError, match=f"unknown language code '{given}'") as raised:
        languages.canonical(given)
    assert suggestion in str(raised.value)


@pytest.mark.parametrize("given", ["", " ", "e", "en/../..", "1", "toolongtag"])
def test_what_is_no_code_at_all_is_refused(given):
    with pytest.raises(UserError, match="unknown language code"):
        languages.canonical(given)


def test_one_language_under_two_codes_is_refused():
    assert languages.canonical_all(["sw", "en", "iw"]) == ("sw", "en", "he")
    with pytest.raises(
        UserError, match=r"given more than once: sw \(as sw, swh\); he \(as he, iw\)"
    ):
        languages.canonical_all(["sw", "he", "swh", "en", "iw"])
    with pytest.raises(TypeError, match="a sequence"):
        languages.canonical_all("en")


def test_names_are_english():
    assert languages.english_name("sw") == "Swahili"
    assert languages.english_name("pt-BR") == "Portuguese (Brazil)"


@pytest.mark.parametrize(
    ("tag", "codes"),
    [
        ("en", ("eng",)),
        ("sw", ("swa", "swh")),
        ("zh-Hant", ("zho", "cmn")),
        ("az", ("aze", "azj")),
        ("fil", ("tgl",)),
        ("yue", ("yue",)),
        ("x-private", ()),
    ],
)
def test_iso_codes_start_with_the_tags_own(tag, codes):
    assert languages.iso639_3(tag) == codes
