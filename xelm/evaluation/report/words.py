"""Numbers and names in the words of the report."""

from collections.abc import Sequence

from clustering.languages import english_name


def perplexity(value: float) -> str:
    """A perplexity with as many digits as are significant."""
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def signed(value: float, digits: int = 1) -> str:
    """A number with so many digits after the point, and a sign unless it rounds to zero."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def typeset(cell: str) -> str:
    """A cell of a table for the terminal as the page shows it: with minus signs and dashes."""
    return "–" if cell in ("", "-") else cell.replace("..", " to ").replace("-", "−")


def count(number: float) -> str:
    """A number of tokens or parameters in short: 950, 590 k, 1.2 M, 3 B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"


def plural(number: int, word: str) -> str:
    """A number with its word in singular or plural: 1 language, 2 languages."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def listed(names: Sequence[str], most: int | None = 12) -> str:
    """Names in a list; of more than `most` only the first, and the number of others."""
    more = len(names) - len(names[:most])
    return ", ".join(names[:most]) + (f" and {more} more" if more else "")


def language_name(tag: str) -> str:
    """English name and tag of a language; the tag alone if it has no name."""
    try:
        name = english_name(tag)
    except ValueError:  # no BCP 47 tag
        return tag
    return tag if name == tag else f"{name} ({tag})"


def named(tags: Sequence[str], most: int | None = 12) -> str:
    """Names of languages in a list, as in `listed`."""
    return listed([language_name(tag) for tag in tags], most)
