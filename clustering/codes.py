"""Tables of language codes, which `languages` applies: codes that Wikipedia and OSCAR write outside
BCP 47, codes with two meanings, codes of families, and scripts that are parts of others."""

from collections.abc import Mapping
from functools import cache

from langcodes import data_dicts
from langcodes.registry_parser import parse_registry

VERSION = 2
"""Version of the rules from codes to tags; raised with a change, so that text is tagged again."""

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
"""Full code, in lower case with hyphens -> the code that replaces it."""

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
"""Code that is one language in Wikipedia and another in ISO 639-3 -> what to write for each."""

NO_LANGUAGE: Mapping[str, str] = {
    "und": "an undetermined language",
    "root": "an undetermined language",
    "mul": "several languages",
    "mis": "a language without a code",
    "zxx": "no linguistic content",
}
"""Code of BCP 47 or CLDR that names no single language -> what it stands for."""

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
"""Code of a family -> some of its languages, which an error message suggests."""

_READ_AS_LANGUAGES = ("nah",)
"""Codes of families that count as languages: Wikipedia and OSCAR have Nahuatl under this code."""

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
"""Language -> its script, where langcodes' likely subtags lack it and it is neither Latin nor that
of the macrolanguage."""

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
"""A language's usual script -> codes (ISO 15924) that count as the same: a part of it, a style of
it, or a wider term for it, as Hani for Hans and Hant."""

UNDETERMINED_SCRIPTS = ("Zinh", "Zyyy", "Zzzz")
"""Codes of ISO 15924 for undetermined scripts."""


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

    A macrolanguage with several such members has none: Twi, Fante and Akan stay apart."""
    found = data_dicts.NORMALIZED_MACROLANGUAGES | {"nb": "no"}  # as CLDR has it since version 39
    wide = list(found.values())
    return {member: macro for member, macro in found.items() if wide.count(macro) == 1}
