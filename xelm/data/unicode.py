"""Unicode rules for all text that comes in: corpora, prompts, chats and stop strings."""

import unicodedata

from clustering.errors import UserError


def normalised(text: str) -> str:
    """The text in Unicode's composed form (NFC), in which models of this project read all text.

    Many tokenizers do not compose characters. To them, decomposed Korean or Vietnamese is text of a
    kind that no model was trained on. UserError for half of a surrogate pair, which JSON and
    command lines can spell, and which is no character.
    """
    if (place := surrogate_in(text)) is not None:
        raise UserError(
            f"a text must be Unicode; got half of a surrogate pair, U+{ord(text[place]):04X}, at "
            f"character {place + 1}"
        )
    return unicodedata.normalize("NFC", text)


def surrogate_in(text: str) -> int | None:
    """Index of the first half of a surrogate pair in a text; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def composed_and_decomposed(text: str) -> tuple[str, ...]:
    """The text as it is given and in both of Unicode's normal forms, each once: forms to search
    for in text that a model wrote, which may be in either."""
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    return tuple(dict.fromkeys([text, *forms]))
