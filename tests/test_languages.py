"""Language codes as users write them become one canonical tag."""

import pytest

from clustering import codes, languages
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
        # The script and region that CLDR adds to the bare language say nothing.
        ("zho_Hans", "zh"),
        ("zh-CN", "zh"),
        ("sr-Cyrl", "sr"),
        ("en-US", "en"),
        ("pt_br", "pt"),
        ("EN_latn_us", "en"),
        # Nor does a part of the usual script, a style of it, or a wider term for it.
        ("cmn_Hani", "zh"),
        ("kor_Hang", "ko"),
        ("jpn_Hira", "ja"),
        ("ur-Aran", "ur"),
        ("yue_Hani", "yue"),
        ("eng_Zyyy", "en"),
        # Another script or region does.
        ("sr_latn", "sr-Latn"),
        ("hi-Latn-IN", "hi-Latn"),
        ("ja-Latn", "ja-Latn"),
        ("en-gb", "en-GB"),
        ("pt-PT", "pt-PT"),
        ("zh-Hant", "zh-Hant"),
        ("zh-TW", "zh-Hant"),
        ("zh-HK", "zh-Hant-HK"),
        ("pa-PK", "pa-Arab"),
        ("sr-ME", "sr-Latn-ME"),
        ("nrm_Latn", "nrm-Latn"),
        ("ar-arz", "arz"),
        ("ar-arb", "ar"),
        ("zh-nan-TW", "nan-TW"),
        # Languages in their own right keep their code, though a macrolanguage covers them.
        ("yue", "yue"),
        ("arz", "arz"),
        ("nn", "nn"),
        ("tw", "tw"),
        # One of them is the usual one.
        ("nb", "no"),
        ("kmr", "ku"),
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


@pytest.mark.parametrize("given", ["", " ", "e", "en/../..", "1", "toolongtag", "sw-old"])
def test_what_is_no_code_at_all_is_refused(given):
    with pytest.raises(UserError, match="unknown language code"):
        languages.canonical(given)


@pytest.mark.parametrize("given", ["und", "mul", "mis", "zxx", "root", "und_Latn"])
def test_a_code_of_no_one_language_is_refused(given):
    with pytest.raises(UserError, match=f"'{given}' stands for .*; name a language"):
        languages.canonical(given)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("sla", "Slavic languages; name one of its languages, such as pl (Polish), ru (Russian)"),
        ("fiu", "Finno-Ugrian languages; name one of its languages, such as fi (Finnish)"),
        ("roa_Latn", "Romance languages; name one of its languages, such as es (Spanish)"),
        ("art", "Artificial languages; name one of its languages"),
    ],
)
def test_a_code_of_a_family_is_refused_with_languages_of_it(given, line):
    with pytest.raises(UserError) as raised:
        languages.canonical(given)
    assert f"language code {given!r} is that of a family, {line}" in str(raised.value)


def test_members_named_for_families_are_languages():
    for family, members in codes.FAMILY_MEMBERS.items():
        assert family in codes.families()
        assert languages.canonical_all(members) == members


@pytest.mark.parametrize(
    ("asked", "available", "found"),
    [
        ("en-US", ["de", "en"], "en"),
        ("en-GB", ["de", "en"], "en"),
        ("en-GB", ["en", "en-GB"], "en-GB"),
        ("eng_Latn", ["de", "en"], "en"),
        ("zh-Hans", ["zh"], "zh"),
        ("zh-HK", ["zh", "zh-Hant"], "zh-Hant"),
        ("prs", ["fa"], "fa"),
        ("simple", ["en"], "en"),
        ("de-u-co-phonebk", ["de"], "de"),
        # As earlier versions wrote them.
        ("ko", ["en", "ko-Hang"], "ko-Hang"),
        ("nob_Latn", ["en", "nb"], "nb"),
        ("und", ["en", "und"], "und"),
        ("ko-Hang", ["ko", "ko-Hang"], "ko-Hang"),
        # Another script, and what is wider than asked.
        ("zh-Hant", ["zh"], None),
        ("sr-Latn", ["sr"], None),
        ("sr", ["sr-Latn"], None),
        ("en", ["en-GB"], None),
        ("fr", ["de", "en", "als"], None),
    ],
)
def test_a_lookup_takes_away_subtags_but_no_script(asked, available, found):
    assert languages.lookup(asked, available) == found


def test_to_find_a_language_nothing_is_taken_away():
    assert languages.find("kor_Hang", ["en", "ko"]) == "ko"
    assert languages.find("ko", ["en", "ko-Hang"]) == "ko-Hang"
    assert languages.find("en-GB", ["en"]) is None
    with pytest.raises(UserError, match="unknown language code 'jp'"):
        languages.lookup("jp", ["ja"])


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
    assert languages.english_name("pt-PT") == "Portuguese (Portugal)"
    assert languages.english_name("be-tarask") == "Belarusian [be-tarask]"


@pytest.mark.parametrize(
    ("tag", "codes"),
    [
        ("en", ("eng",)),
        ("sw", ("swa", "swh")),
        ("zh-Hant", ("zho", "cmn")),
        ("az", ("aze", "azj")),
        ("fil", ("tgl",)),
        ("no", ("nor", "nob")),
        ("ku", ("kur", "kmr")),
        ("ak", ("aka", "fat", "twi")),
        ("tw", ("twi",)),
        ("fa-AF", ("prs", "fas", "pes")),
        ("sr-Latn", ("srp", "scc")),
        ("yue", ("yue",)),
        ("x-private", ()),
    ],
)
def test_iso_codes_start_with_the_tags_own(tag, codes):
    assert languages.iso639_3(tag) == codes
