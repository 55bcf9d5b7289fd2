"""Statistics of the text of each language: its size, how well the tokenizer spells it, how many
copies it has, and how much of it is in the text that a RUN was trained on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from xelm.data.coverage import MAX_UNKNOWN_SHARE
from xelm.data.store import Store

MOST_TRAINED = 0.01
"""Share of a language's documents in the training text above which its figures are marked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextStats:
    """Statistics of the text of one language."""

    language: str
    """Canonical tag."""
    documents: int
    """Number of documents."""
    tokens: int
    """Number of tokens without special ones."""
    bytes: int
    """Number of UTF-8 bytes."""
    characters: int
    """Number of characters."""
    visible_characters: int
    """Number of characters that are not white space."""
    unknown_characters: int
    """Number of visible characters that the tokenizer does not know."""
    byte_tokens: int
    """Number of tokens that are only a part of a character."""
    duplicates: int
    """Number of documents that are exact copies of earlier ones, left out or not."""
    compared: int | None = None
    """Number of documents that were compared with the training text; None where none could be."""
    exact: int | None = None
    """Number of the compared documents that are in the training text exactly as they are."""
    near: int | None = None
    """Number of the compared documents that have only a near copy in the training text."""

    @property
    def tokens_per_character(self) -> float:
        """Tokens per character."""
        return self.tokens / self.characters

    @property
    def unknown_share(self) -> float:
        """Share of the visible characters that are unknown to the tokenizer."""
        return self.unknown_characters / self.visible_characters

    @property
    def byte_share(self) -> float | None:
        """Share of the tokens that are only a part of a character; None without any token."""
        return self.byte_tokens / self.tokens if self.tokens else None

    @property
    def trained_share(self) -> float | None:
        """Share of the compared documents that are in the training text, exactly or nearly."""
        if not self.compared or self.exact is None or self.near is None:
            return None
        return (self.exact + self.near) / self.compared

    @property
    def unspelled(self) -> bool:
        """Whether so much is unknown to the tokenizer that a likelihood means nothing."""
        return self.unknown_share > MAX_UNKNOWN_SHARE

    @property
    def trained(self) -> bool:
        """Whether so much is in the training text that this is not held-out text."""
        return (self.trained_share or 0.0) > MOST_TRAINED

    @property
    def marks(self) -> str:
        """Marks of figures in this language: `?` unspelled, `!` trained on."""
        return "?" * self.unspelled + "!" * self.trained

    def to_json(self) -> dict[str, Any]:
        """The statistics as in results.json, with the shares."""
        shares = ("tokens_per_character", "unknown_share", "byte_share", "trained_share")
        return asdict(self) | {name: getattr(self, name) for name in shares}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TextStats":
        """The statistics of an entry of results.json."""
        return cls(**{field.name: value[field.name] for field in fields(cls)})


def text_stats(store: Store) -> dict[str, TextStats]:
    """Statistics of each language of a store, as the store has counted them."""
    counts = store.record["languages"]
    return {tag: TextStats(language=tag, **counts[tag]) for tag in store.languages}


def warnings(texts: Mapping[str, TextStats]) -> list[str]:
    """One line for each kind of mark, with the languages that have it."""
    lines = []
    if unspelled := [f"{t} {s.unknown_share:.1%}" for t, s in texts.items() if s.unspelled]:
        lines.append(
            f"characters unknown to the tokenizer: {', '.join(unspelled)}. A model that reads "
            "unknown tokens predicts them easily: perplexity and bits per byte say nothing there, "
            "are marked ?, are in no mean and never the best"
        )
    if trained := [f"{t} {s.trained_share:.1%}" for t, s in texts.items() if s.trained]:
        lines.append(
            f"documents that are in the text this RUN was trained on, as they are or nearly so: "
            f"{', '.join(trained)}. Figures there are not of held-out text, and are marked !"
        )
    return lines


def duplicate_notes(texts: Mapping[str, TextStats], left_out: bool) -> list[str]:
    """One line with the number of documents that are exact copies, if there are any."""
    count = sum(text.duplicates for text in texts.values())
    if not count:
        return []
    which = ", ".join(
        f"{tag} {text.duplicates:,}" for tag, text in texts.items() if text.duplicates
    )
    what = "1 document is an exact copy" if count == 1 else f"{count:,} documents are exact copies"
    return [f"{what} of earlier ones ({which}); {'left out' if left_out else 'kept'}"]
