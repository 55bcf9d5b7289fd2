"""Tables behind `languages`: codes that Wikipedia and OSCAR write outside BCP 47, codes with two
meanings, codes of families, scripts within scripts.

Knows facts about codes. Does not turn one code into another; that is `languages`.
"""

from collections.abc import Mapping
from functools import cache

from langcodes import data_dicts
from langcodes.registry_parser import parse_registry

VERSION = 2
"""Of what codes become what tags: raise it with a change, so that stored text is tagged again."""

ALIASES: Mapping[str, str] = {
    # Wikipedia's subdomains, with the tags that MediaWiki writes into its pages.
    "bat-smg": "sgs",
    "be-x-old": "be-tarask",
    "cbk-zam": "cbk",
    "eml": "egl",
    "fiu-vro": "vro",
    "map-bms": "jv-x-bms",
    "roa-rup": "rup",
    "roa-tara": "nap-x-tara",
    "simple": "en-simple",
    "zh-classical": "lzh",
    "zh-min-nan": "nan",
    "zh-yue": "yue",
    # In ISO 639 the family of Bihari languages; text under these codes is Bhojpuri.
    "bh": "bho",
    "bih": "bho",
    # OSCAR's spelling of Wikipedia's eml.
    "x-eml": "egl",
}
"""Whole codes, in lower case with hyphens -> what they stand for."""

AMBIGUOUS: Mapping[str, tuple[str, str]] = {
    "als": (
        "gsw (Alemannic, which Wikipedia and OSCAR call als)",
        "sq (Tosk Albanian, which ISO 639-3 calls als; als_Latn says that too)",
    ),
    "nrm": (
        "nrf (Norman, which Wikipedia calls nrm)",
        "nrm-Latn (Narom, which ISO 639-3 calls nrm)",
    ),
}
"""Codes that mean one language in Wikipedia and another in ISO 639-3 -> both, to be written so."""

NO_LANGUAGE: Mapping[str, str] = {
    "und": "an undetermined language",
    "root": "an undetermined language",
    "mul": "several languages",
    "mis": "a language without a code",
    "zxx": "no linguistic content",
}
"""Codes that BCP 47 and CLDR have for what is no one language -> what they stand for."""

FAMILY_MEMBERS: Mapping[str, tuple[str, ...]] = {
    "afa": ("ar", "ha", "am"),
    "alg": ("cr", "oj", "mic"),
    "aus": ("wbp", "pjt", "aer"),
    "azc": ("nhe", "hop", "yaq"),
    "bat": ("lt", "lv", "sgs"),
    "ber": ("kab", "tzm", "zgh"),
    "bnt": ("sw", "zu", "ln"),
    "cau": ("ka", "ce", "ab"),
    "cel": ("cy", "ga", "br"),
    "cus": ("so", "om", "sid"),
    "dra": ("ta", "te", "kn"),
    "fiu": ("fi", "hu", "et"),
    "gem": ("de", "en", "sv"),
    "gmq": ("sv", "da", "is"),
    "gmw": ("de", "en", "nl"),
    "inc": ("hi", "bn", "mr"),
    "ine": ("en", "ru", "hi"),
    "ira": ("fa", "ku", "ps"),
    "kar": ("ksw", "pwo", "kyu"),
    "map": ("id", "mg", "mi"),
    "mkh": ("vi", "km", "kha"),
    "myn": ("yua", "quc", "kek"),
    "nic": ("sw", "yo", "wo"),
    "phi": ("fil", "ceb", "ilo"),
    "qwe": ("qu", "quy", "qug"),
    "roa": ("es", "fr", "ro"),
    "sem": ("ar", "he", "am"),
    "sgn": ("ase", "bfi", "gsg"),
    "sit": ("zh", "bo", "my"),
    "sla": ("pl", "ru", "cs"),
    "smi": ("se", "smn", "sms"),
    "son": ("ses", "dje", "khq"),
    "tai": ("th", "lo", "shn"),
    "trk": ("tr", "kk", "uz"),
    "urj": ("fi", "hu", "udm"),
    "xgn": ("mn", "bua", "xal"),
    "zhx": ("zh", "yue", "nan"),
    "zle": ("ru", "uk", "be"),
    "zls": ("bg", "sr", "sl"),
    "zlw": ("pl", "cs", "sk"),
}
"""Codes of families -> some of their languages, to suggest."""

_READ_AS_LANGUAGES = ("nah",)
"""ISO 639-5 counts Nahuatl as a family; Wikipedia and OSCAR have text under its code alone."""

USUAL_SCRIPTS: Mapping[str, str] = {
    "anp": "Deva",
    "azb": "Arab",
    "blk": "Mymr",
    "hyw": "Armn",
    "jrb": "Hebr",
    "mvf": "Mong",
    "rki": "Mymr",
    "uzs": "Arab",
    "xal": "Cyrl",
}
"""Languages that langcodes' likely subtags do not know, which are written neither in Latin nor as
their macrolanguage is."""

SCRIPTS_WITHIN: Mapping[str, tuple[str, ...]] = {
    "Arab": ("Aran",),
    "Cyrl": ("Cyrs",),
    "Hans": ("Hani",),
    "Hant": ("Hani", "Hanb"),
    "Jpan": ("Hani", "Hira", "Hrkt", "Kana"),
    "Kore": ("Hang", "Jamo"),
    "Latn": ("Latf", "Latg"),
    "Syrc": ("Syre", "Syrj", "Syrn"),
}
"""A language's usual script -> other codes (ISO 15924) that text in it is given: a part of it, a
style of it or, as Hani of Hans and Hant, a wider term for it."""

UNDETERMINED_SCRIPTS = ("Zinh", "Zyyy", "Zzzz")
"""ISO 15924 for scripts that are not determined."""


@cache
def families() -> Mapping[str, str]:
    """Code of a family, or other collection of languages -> its English name (IANA's registry)."""
    return {
        entry["Subtag"]: entry["Description"][0]
        for entry in parse_registry()
        if entry.get("Scope") == "collection" and entry["Subtag"] not in _READ_AS_LANGUAGES
    }


@cache
def usual_members() -> Mapping[str, str]:
    """Code of an individual language -> the macrolanguage that is mostly written in it (CLDR).

    A macrolanguage with several such members has none: Twi, Fante and Akan stay apart.
    """
    found = data_dicts.NORMALIZED_MACROLANGUAGES | {"nb": "no"}  # as CLDR has it since version 39
    wide = list(found.values())
    return {
        member: macrolanguage
        for member, macrolanguage in found.items()
        if wide.count(macrolanguage) == 1
    }
