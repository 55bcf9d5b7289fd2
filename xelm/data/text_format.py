"""Special tokens around and within the text that models read, as a plain value."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int, Integer


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFormat:
    """Ids of the special tokens with which models read text; made by `Tokenizer.text_format`."""

    start_id: int | None
    """Token before every text; None: there is none, and the first token is not predicted."""
    end_id: int
    """Token after every document."""
    mask_id: int | None = None
    """Token that stands for a masked one; None in tokenizers of decoders."""
    ordinary_ids: Int[np.ndarray, " _"] | None = field(default=None, compare=False)
    """Ids that are no special tokens, ascending, which masking chooses; None without mask_id."""

    @property
    def start_ids(self) -> list[int]:
        """Tokens before every text: one id or none."""
        return [] if self.start_id is None else [self.start_id]

    def framed(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> Int[np.ndarray, " _"]:
        """The ids of a document with its start, if there is one, and its end."""
        return np.concatenate([self.start_ids, ids, [self.end_id]]).astype(np.int64)
