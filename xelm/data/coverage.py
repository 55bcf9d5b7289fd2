"""Counts text that a tokenizer does not cover: unknown characters, and tokens that are bytes.

A model that reads every word of a language as the unknown token predicts it easily, so that its
perplexity there says nothing; and a text in single bytes is several times as long.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from xelm.data.special_tokens import encodings
from xelm.data.tokenizer import Tokenizer, encode

# Letters of Cuneiform and Vai, which hardly any vocabulary contains.
_RARE = ("\U00012000", "\ua500")
MAX_UNKNOWN_SHARE = 0.01
"""Largest share of unknown characters in a language that is still measured by its likelihood."""


class CoverageCounts(NamedTuple):
    """Counts of one or more texts, in the order of the columns of `Coverage.count`."""

    characters: int
    """Number of characters."""
    visible_characters: int
    """Number of characters that are no white space."""
    unknown_characters: int
    """Number of visible characters that became the unknown token, or were left out."""
    byte_tokens: int
    """Number of tokens that are only a part of a character: byte pieces of sentencepiece, and
    pieces of byte-level vocabularies that are no complete characters."""


class Coverage:
    """Coverage of text by a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        backend = tokenizer.special.plain
        self._backend = backend
        self._is_unknown = np.zeros(tokenizer.size, bool)
        self._is_unknown[_unknown_ids(tokenizer.hub)] = True
        self._is_byte = _byte_pieces(backend, tokenizer.size)
        # Vocabularies with neither an unknown token nor bytes leave out unknown characters.
        plain, *rare = encode(backend, ["a", *(f"a{letter}" for letter in _RARE)])
        self._drops = any(ids == plain for ids in rare)

    def count(
        self, texts: Sequence[str], ids: Sequence[Sequence[int]]
    ) -> Int32[np.ndarray, "documents 4"]:
        """`CoverageCounts` of each text; ids: token ids of each text."""
        flat = np.concatenate([np.asarray(tokens, np.int64) for tokens in ids])
        ends = np.cumsum([len(tokens) for tokens in ids])
        found = np.zeros((len(texts), len(CoverageCounts._fields)), np.int32)
        found[:, 0] = [len(text) for text in texts]
        found[:, 1] = [len("".join(text.split())) for text in texts]
        found[:, 3] = _sums(self._is_byte[flat], ends)
        unknown = _sums(self._is_unknown[flat], ends)
        doubtful = range(len(texts)) if self._drops else np.flatnonzero(unknown).tolist()
        if doubtful:
            # One unknown token may stand for a whole word; its offsets say how many characters.
            some = [texts[number] for number in doubtful]
            located = encodings(self._backend, some)
            for number, text, encoding in zip(doubtful, some, located):
                found[number, 2] = self._unknown_characters(text, encoding)
        return found

    def _unknown_characters(self, text: str, encoding: Any) -> int:
        lost = np.full(len(text), self._drops)
        for token, (begin, end) in zip(encoding.ids, encoding.offsets):
            lost[begin:end] = self._is_unknown[token]
        return sum(not text[place].isspace() for place in np.flatnonzero(lost))


def _sums(flags: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Number of flags set in each part; parts end at `ends`."""
    return np.diff(np.concatenate([[0], np.cumsum(flags)])[ends], prepend=0)


def _unknown_ids(hub: Any) -> list[int]:
    """Ids that stand for unknown text."""
    model = json.loads(hub.backend_tokenizer.to_str())["model"]
    named = hub.backend_tokenizer.token_to_id(model.get("unk_token") or "")
    return [id for id in {hub.unk_token_id, model.get("unk_id"), named} if id is not None]


def _byte_pieces(backend: Any, size: int) -> np.ndarray:
    """Whether each id, decoded alone, is no complete character."""
    read = backend.decode_batch([[id] for id in range(size)], skip_special_tokens=False)
    found = np.asarray(["\ufffd" in text for text in read], bool)
    (itself,) = encode(backend, ["\ufffd"])
    if len(itself) == 1:  # the replacement character is a character, too
        found[itself[0]] = False
    return found
