"""The nearest relative of a language is of its own branch, and `grow`, `nearest` and the parent of
an expert are of one mind."""

import pytest
from test_language_codes import FLORES_200

from clustering import genealogy
from clustering.languages import canonical_all
from xelm.runs.distances import Sources, measured
from xelm.runs.nearest import relatives

SERVED = {
    *("en", "de", "es", "fr", "pl", "ru", "el", "tr", "ar", "am", "ha", "hi", "fa", "zh", "my"),
    *("ja", "ko", "vi", "th", "id", "fil", "sw", "yo", "fi", "ta", "ka", "eu"),
}
# A new language -> the served languages of its own branch.
PARENTS = {
    # Turkic, of which little grammar is recorded, in three scripts
    **dict.fromkeys(["kk", "az", "uz", "tt", "ug", "ky", "tk", "ba"], "tr"),
    # Romance, Slavic, Baltic and Germanic
    **dict.fromkeys(["gl", "pt", "ast"], "es"),
    **dict.fromkeys(["ca", "it", "ro", "oc", "sc"], "es fr"),
    **dict.fromkeys(["sk", "cs", "szl"], "pl"),
    **dict.fromkeys(["uk", "be"], "ru"),
    **dict.fromkeys(["bg", "sr", "hr", "sl", "mk", "lt", "lv"], "pl ru"),
    **dict.fromkeys(["nl", "af", "lb", "sv", "da", "nn", "nb", "is"], "de en"),
    # Iranian and Indo-Aryan
    **dict.fromkeys(["tg", "ckb", "ps"], "fa"),
    **dict.fromkeys(["bn", "ur", "mr", "ne", "pa", "gu", "si", "mai"], "hi"),
    # Semitic, Sinitic, Dravidian, Uralic, Tai
    **dict.fromkeys(["he", "mt", "arz", "ary"], "ar"),
    "ti": "am",
    "yue": "zh",
    **dict.fromkeys(["te", "kn", "ml"], "ta"),
    **dict.fromkeys(["et", "hu"], "fi"),
    **dict.fromkeys(["lo", "shn"], "th"),
    # Austronesian, Austroasiatic, Atlantic-Congo
    **dict.fromkeys(["jv", "ms", "su"], "id"),
    **dict.fromkeys(["ceb", "ilo", "war"], "fil"),
    "km": "vi",
    **dict.fromkeys(["zu", "rw", "sn", "ln"], "sw"),
    "ig": "yo",
}


def test_the_nearest_language_is_of_the_own_branch():
    found = {
        tag: relatives(tag, ["mixture"], Sources(), sorted(SERVED))[0].language for tag in PARENTS
    }
    wrong = {tag: near for tag, near in found.items() if near not in PARENTS[tag].split()}
    assert len(PARENTS) > 60 and wrong == {}


@pytest.mark.parametrize(
    ("language", "served", "parent"),
    [
        ("kk", "ur,tr", "tr"),
        ("gl", "pl,es,fr", "es"),
        ("pt", "bg,es,fr,en", "es"),
        ("sk", "pl,en,de", "pl"),
        ("kk", "ur,tr,sk,kok,nn", "tr"),
        ("quy", "es,qu,gn", "qu"),
        ("nn", "en,de,nb", "no"),
        # Without a relative, what is near in grammar and place, and not what nobody knows of.
        ("eu", "ja,es,zh", "es"),
        ("ta", "eu,hi,fr", "hi"),
    ],
)
def test_parents_among_few(language, served, parent):
    near = relatives(language, ["mixture"], Sources(), served.split(","))
    assert near[0].language == parent
    assert all(each.by_measure["mixture"].distance >= 0 for each in near)


def test_every_language_of_flores_has_a_nearest_of_its_branch():
    tags = canonical_all(FLORES_200)
    mixture = measured("mixture", tags, Sources()).complete()
    branches = genealogy.distances(tags)
    far = []
    for tag in tags:
        near, *_ = mixture.relatives(tag)
        closest, *_ = branches.relatives(tag)
        # Of the same branch, or next to it.
        if branches.between(tag, near.language) > closest.distance + 0.25:
            far.append((tag, near.language, closest.language))
    # Tok Pisin descends from English, and is otherwise far.
    assert (len(tags), far) == (204, [("en", "lb", "tpi")])
