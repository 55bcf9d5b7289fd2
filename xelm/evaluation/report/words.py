"""Numbers and names as the report says them."""

from collections.abc import Sequence

from clustering.languages import english_name


def perplexity(value: float) -> str:
    """With as many digits as say something."""
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def signed(value: float, digits: int = 1) -> str:
    """So many digits after the point, with a sign unless they are zero."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def typeset(cell: str) -> str:
    """A cell of a table for the terminal as the page shows it: with minus signs and dashes."""
    return "–" if cell in ("", "-") else cell.replace("..", " to ").replace("-", "−")


def count(number: float) -> str:
    """A number of tokens or parameters for people: 950, 590 k, 1.2 M, 3 B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"


def plural(number: int, word: str) -> str:
    """1 language, 2 languages."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def listed(names: Sequence[str], most: int | None = 12) -> str:
    """Names; of more than `most` the first, and how many there are besides."""
    more = len(names) - len(names[:most])
    return ", ".join(names[:most]) + (f" and {more} more" if more else "")


def language_name(tag: str) -> str:
    """English name and tag; the tag alone if it has no name."""
    try:
        name = english_name(tag)
    except ValueError:  # no BCP 47 tag
        return tag
    return tag if name == tag else f"{name} ({tag})"


def named(tags: Sequence[str], most: int | None = 12) -> str:
    """Names of languages, as `listed`."""
    return listed([language_name(tag) for tag in tags], most)
