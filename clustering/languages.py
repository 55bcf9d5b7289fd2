"""Language codes: the canonical BCP 47 tag of any code, ISO 639-3 codes, English names, look-ups.

The aliases and likely subtags of BCP 47 and CLDR come from the `langcodes` library, and codes of
Wikipedia and OSCAR from `codes`: `iw` is `he`, `swh` is `sw`, `cmn_Hani` and `zh-CN` are `zh`,
`kor_Hang` is `ko`. A region or script that is not the usual one stays (`pt-PT`, `sr-Latn`).
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import langcodes
from langcodes import data_dicts

from clustering import codes
from clustering.errors import UserError


@cache
def canonical(code: str) -> str:
    """The canonical tag of a language code; UserError with suggestions if it names no language.

    The script and the region that CLDR's likely subtags would add are left out (`en_Latn-US` ->
    `en`); others are written, the script always (`zh-TW` -> `zh-Hant`, `zh-HK` -> `zh-Hant-HK`). An
    individual language that is the standard form of its macrolanguage in CLDR becomes the latter
    (`swh` -> `sw`, `nb` -> `no`); others keep their own code (`yue`, `arz`, `nn`, `tw`). Codes of
    families (`sla`), of no single language (`und`), and codes that Wikipedia and ISO 639-3 give to
    different languages (`als`) are refused."""
    written = _written(code)
    known = codes.ALIASES.get(written, written)
    _check_is_language(code, known)
    language = _subtags(known) if langcodes.tag_is_valid(known) else None
    if language is None:
        raise UserError(f"unknown language code {code!r}{_suggestions(code)}")
    tag = _minimised(language)
    # Written with its script, since without it the code would mean either language.
    return f"{tag}-{_usual_script(tag)}" if tag in codes.AMBIGUOUS else tag


def is_old_code(code: str) -> bool:
    """Whether a code is one that Wikipedia or OSCAR writes outside BCP 47, such as `simple`."""
    return _written(code) in codes.ALIASES


def canonical_all(languages: Iterable[str]) -> tuple[str, ...]:
    """Canonical tags in the given order; UserError for unknown codes and repeated languages."""
    if isinstance(languages, str):
        raise TypeError(f"languages must be a sequence of codes; got the string {languages!r}")
    given: dict[str, list[str]] = {}
    for code in languages:
        given.setdefault(canonical(code), []).append(code)
    twice = [
        f"{tag} (as {', '.join(written)})" for tag, written in given.items() if len(written) > 1
    ]
    if twice:
        raise UserError(f"languages are given more than once: {'; '.join(twice[:5])}")
    return tuple(given)


def find(language: str, available: Iterable[str]) -> str | None:
    """The available code of the same language, as it is written there; None if there is none.

    Available codes may have any spelling: `ko` finds `ko-Hang`. UserError for an unknown
    `language`, unless it is available letter by letter."""
    some = list(available)
    return language if language in some else _find_tag(canonical(language), some)


def lookup(language: str, available: Iterable[str]) -> str | None:
    """The available code that fits a language best, as it is written there; None if there is none.

    It is that of `find`, or else of RFC 4647's lookup (section 3.4): the last subtag is removed
    until a code fits, so `en-GB` finds `en`. Unlike there, and as in CLDR's parent locales, a
    script is never removed: `zh-HK` finds `zh-Hant`, and neither finds `zh`."""
    some = list(available)
    if (found := find(language, some)) is not None:
        return found
    fits = (_find_tag(tag, some) for tag in _wider(canonical(language)))
    return next((code for code in fits if code is not None), None)


def without(
    languages: Iterable[str], excluded: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Canonical tags of the languages that are not excluded, and of those that are.

    UserError as `canonical_all`, for an excluded language that is not among `languages`, and if
    none is left."""
    left_out, given = canonical_all(excluded), canonical_all(languages)
    unknown = [tag for tag in left_out if tag not in given]
    if unknown:
        raise UserError(
            f"{', '.join(unknown[:5])} cannot be excluded: the languages are {', '.join(given)}"
        )
    tags = tuple(tag for tag in given if tag not in left_out)
    if left_out and not tags:
        raise UserError(f"every language is excluded: {', '.join(left_out)}")
    return tags, left_out


@cache
def english_name(tag: str) -> str:
    """English name of a language, such as 'Swahili' or 'Portuguese (Portugal)'."""
    language = langcodes.Language.get(tag)
    name = language.display_name("en")
    # Names cover languages, scripts and regions alone.
    return f"{name} [{tag}]" if language.variants or language.private else name


@cache
def iso639_3(tag: str) -> tuple[str, ...]:
    """Three-letter codes of the language of a canonical tag, its own first: `az` -> aze, azj.

    Scripts are ignored, since typological data have none, and so are regions, unless the tag names
    a language (`fa-AF` -> prs, fas, pes). Empty for tags without such a code (`x-private`)."""
    language = langcodes.Language.get(tag).language or "und"
    replaced = data_dicts.LANGUAGE_REPLACEMENTS
    aliases = replaced | data_dicts.NORMALIZED_MACROLANGUAGES | dict(codes.usual_members())
    members = [old for old in data_dicts.MACROLANGUAGES if replaced.get(old) == tag != language]
    written = [*members, language, *sorted(old for old, new in aliases.items() if new == language)]
    found = (data_dicts.LANGUAGE_ALPHA3.get(code, code) for code in written)
    older = data_dicts.LANGUAGE_ALPHA3_BIBLIOGRAPHIC.values()  # `chi` is ISO 639-2 only
    return tuple(dict.fromkeys(code for code in found if len(code) == 3 and code not in older))


def _written(code: str) -> str:
    return code.strip().replace("_", "-").lower()


def _check_is_language(code: str, known: str) -> None:
    """Raises UserError for a code of a family, of no single language, or of two."""
    if known in codes.AMBIGUOUS:
        one, other = codes.AMBIGUOUS[known]
        raise UserError(f"language code {code!r} has two meanings; write {one} or {other}")
    if known in data_dicts.LANGUAGE_REPLACEMENTS and "-" in known:
        return  # such as sgn-us, which is ase
    first = known.partition("-")[0]
    if first in codes.NO_LANGUAGE:
        raise UserError(
            f"language code {code!r} stands for {codes.NO_LANGUAGE[first]}; name a language"
        )
    if len(first) == 3 and first in codes.families():
        members = ", ".join(f"{m} ({english_name(m)})" for m in codes.FAMILY_MEMBERS.get(first, ()))
        raise UserError(
            f"language code {code!r} is that of a family, {codes.families()[first]}; name one of "
            f"its languages{f', such as {members}' if members else ''}"
        )


def _subtags(tag: str) -> langcodes.Language | None:
    """The language of a valid tag. An extended language subtag becomes its code (RFC 5646, section
    4.5: `ar-arz` is `arz`), and the usual member of a macrolanguage becomes that; None if the
    extended subtag is no member of the macrolanguage before it."""
    language = langcodes.Language.get(tag)
    code = language.language or "und"
    if language.extlangs:
        code = language.extlangs[0]
        if data_dicts.MACROLANGUAGES.get(code) != language.language:
            return None
    wide = codes.usual_members().get(code, code)
    return _remade(language, wide, language.script, language.territory)


def _minimised(language: langcodes.Language) -> str:
    """The tag of a language without its usual script and region."""
    code, script, region = language.language, language.script, language.territory
    if code is None or code.startswith("x-"):
        return language.to_tag()
    usual = _usual_script(code)
    if script in codes.UNDETERMINED_SCRIPTS:
        script = None
    if script is None and region is not None:
        there = data_dicts.LIKELY_SUBTAGS.get(f"{code}-{region}")  # as in pa-PK
        script = langcodes.Language.get(there).script if there else None
    if script == usual or script in codes.SCRIPTS_WITHIN.get(usual, ()):
        script = None
    likely = data_dicts.LIKELY_SUBTAGS
    if likely.get(f"{code}-{script}", likely.get(code, "")).endswith(f"-{region}"):
        region = None
    return _remade(language, code, script, region).to_tag()


def _remade(
    language: langcodes.Language, code: str, script: str | None, region: str | None
) -> langcodes.Language:
    """The language with these subtags, and without an extended language subtag."""
    return langcodes.Language.make(
        language=code,
        script=script,
        territory=region,
        variants=language.variants,
        extensions=language.extensions,
        private=language.private,
    )


@cache
def _usual_script(language: str) -> str:
    """Script of a language by CLDR's likely subtags; if these lack it, the script of its
    macrolanguage, or else Latn."""
    if language in codes.USUAL_SCRIPTS:
        return codes.USUAL_SCRIPTS[language]
    wide = data_dicts.MACROLANGUAGES.get(language)
    if language not in data_dicts.LIKELY_SUBTAGS and wide is not None:
        return _usual_script(wide)
    return langcodes.Language.make(language=language).maximize().script or "Latn"


def _find_tag(tag: str, available: Sequence[str]) -> str | None:
    if tag in available:
        return tag
    return next((code for code in available if _tag_or_itself(code) == tag), None)


@cache
def _tag_or_itself(code: str) -> str:
    """The canonical tag of a code, or the code itself if it is unknown."""
    try:
        return canonical(code)
    except UserError:
        return code


def _wider(tag: str) -> Iterator[str]:
    """The tag with fewer and fewer subtags at its end, down to language or language and script."""
    parts = tag.split("-")
    while len(parts) > 1 and not re.fullmatch("[A-Z][a-z]{3}", parts[-1]):  # a script
        parts = parts[:-1]
        if len(parts[-1]) == 1:  # a subtag that introduces an extension, without it
            parts = parts[:-1]
        if parts:
            yield "-".join(parts)


@cache
def kindred_iso639_3(tag: str) -> tuple[str, ...]:
    """Three-letter codes to use where a language's own have no data: its macrolanguage's (nn ->
    nor), or those of a macrolanguage's members."""
    language = langcodes.Language.get(tag).language or "und"
    above = data_dicts.MACROLANGUAGES.get(language)
    own = {language, *iso639_3(tag)}
    members = [code for code, macro in data_dicts.MACROLANGUAGES.items() if macro in own]
    found = [code for related in [above, *members] if related for code in iso639_3(related)]
    return tuple(dict.fromkeys(found))


def _suggestions(code: str) -> str:
    try:
        likely = [langcodes.find(code).to_tag()]  # a name such as "Swahili"
    except LookupError:
        known = sorted(data_dicts.LANGUAGE_ALPHA3)
        likely = difflib.get_close_matches(code.lower(), known, n=3, cutoff=0.5)
        # Countries are the usual mistake (jp, cz, gr).
        if len(code) == 2 and langcodes.tag_is_valid(f"und-{code}"):
            country = langcodes.Language.get(f"und-{code}").maximize().language
            likely = [country] * (country not in (None, "und")) + likely
        likely = list(dict.fromkeys(likely))
    named = [f"{tag} ({english_name(tag)})" for tag in likely[:3]]
    return f"; did you mean {', '.join(named)}?" if named else ""
