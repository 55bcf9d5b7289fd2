"""How rows of token ids are made of documents."""

from dataclasses import dataclass

from xelm.data.masking import Masking


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFormat:
    """Special tokens around each document, and what masking needs to know of the tokenizer."""

    start_id: int | None
    """Token before every document; with None, a document's first token is not predicted."""
    end_id: int
    """Token after every document."""
    masking: Masking | None = None
    """Ids for masked training; None for decoders."""
