"""What every text passes on its way in, whoever gives it: corpora, prompts, chats, stop strings."""

import unicodedata

from clustering.errors import UserError


def normalised(text: str) -> str:
    """The text in Unicode's composed form (NFC), in which models of this project read all text.

    Many tokenizers do not compose: to these, decomposed Korean or Vietnamese is text of a kind that
    no model was trained on. UserError for half of a surrogate pair, which is no character.
    """
    check_unicode(text)
    return unicodedata.normalize("NFC", text)


def check_unicode(text: str) -> None:
    """Raises UserError for half of a surrogate pair, which JSON and command lines can spell."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise UserError(
            f"a text must be Unicode; got half of a surrogate pair, {half}, at character "
            f"{error.start + 1}"
        ) from None


def composed_and_decomposed(text: str) -> tuple[str, ...]:
    """The text as it is given and in both of Unicode's normal forms, each once: what is looked for
    in text that a model wrote, which may be in either."""
    forms = (text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD")))
    return tuple(dict.fromkeys(forms))
