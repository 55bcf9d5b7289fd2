"""Language codes as users write them -> one canonical BCP 47 tag, ISO 639-3 codes, an English name.

Knows the aliases of BCP 47 and CLDR through the `langcodes` library: `iw` is `he`, `swh` is `sw`,
`cmn` and `zho` are `zh`, `eng_Latn` is `en`. Keeps region and script where they say something
(`pt-BR`, `sr-Latn`). Does not know which language has which data; that is `uriel`.
"""

import difflib
from collections.abc import Iterable
from functools import cache

import langcodes
from langcodes import data_dicts

from clustering.errors import UserError


@cache
def canonical(code: str) -> str:
    """The canonical tag of a language code; UserError with suggestions if it is unknown.

    An individual language that CLDR holds for the standard form of its macrolanguage becomes the
    latter (`swh` -> `sw`); others keep their own code (`yue`, `arz`, `nn`).
    """
    if not langcodes.tag_is_valid(code):
        raise UserError(f"unknown language code {code!r}{_suggestions(code)}")
    return langcodes.standardize_tag(code, macro=True)


def canonical_all(codes: Iterable[str]) -> tuple[str, ...]:
    """Canonical tags in the given order; UserError for unknown codes and repeated languages."""
    if isinstance(codes, str):
        raise TypeError(f"a sequence of language codes wanted; got the string {codes!r}")
    given: dict[str, list[str]] = {}
    for code in codes:
        given.setdefault(canonical(code), []).append(code)
    twice = [
        f"{tag} (as {', '.join(written)})" for tag, written in given.items() if len(written) > 1
    ]
    if twice:
        raise UserError(f"each language once; given more than once: {'; '.join(twice[:5])}")
    return tuple(given)


def without(
    languages: Iterable[str], excluded: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Canonical tags of the languages that are not excluded, and of those that are; UserError as
    `canonical_all`, and if none is left."""
    left_out = canonical_all(excluded)
    tags = tuple(tag for tag in canonical_all(languages) if tag not in left_out)
    if left_out and not tags:
        raise UserError(f"every language is excluded: {', '.join(left_out)}")
    return tags, left_out


@cache
def english_name(tag: str) -> str:
    """The name for people, as in 'Swahili' or 'Portuguese (Brazil)'."""
    return langcodes.Language.get(tag).display_name("en")


@cache
def iso639_3(tag: str) -> tuple[str, ...]:
    """Three-letter codes of the language of a canonical tag, its own first: `az` -> aze, azj.

    Region and script are ignored, as typological data has neither. Empty for tags without such a
    code (`x-private`).
    """
    language = langcodes.Language.get(tag).language or "und"
    aliases = data_dicts.LANGUAGE_REPLACEMENTS | data_dicts.NORMALIZED_MACROLANGUAGES
    written = [language, *sorted(old for old, new in aliases.items() if new == language)]
    codes = (data_dicts.LANGUAGE_ALPHA3.get(code, code) for code in written)
    older = data_dicts.LANGUAGE_ALPHA3_BIBLIOGRAPHIC.values()  # `chi` is ISO 639-2 only
    return tuple(dict.fromkeys(code for code in codes if len(code) == 3 and code not in older))


def _suggestions(code: str) -> str:
    try:
        likely = [langcodes.find(code).to_tag()]  # a name such as "Swahili"
    except LookupError:
        # Countries are the usual mistake (jp, cz, gr); then codes that look alike.
        country = (
            [langcodes.Language.get(f"und-{code}").maximize().language] if _is_country(code) else []
        )
        alike = difflib.get_close_matches(
            code.lower(), sorted(data_dicts.LANGUAGE_ALPHA3), n=3, cutoff=0.5
        )
        likely = list(dict.fromkeys(tag for tag in country + alike if tag and tag != "und"))
    named = [f"{tag} ({english_name(tag)})" for tag in likely[:3]]
    return f"; did you mean {', '.join(named)}?" if named else ""


def _is_country(code: str) -> bool:
    return len(code) == 2 and langcodes.tag_is_valid(f"und-{code}")
