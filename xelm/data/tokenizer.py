"""Loads the tokenizers of checkpoints: text to ids and back, chats, and special tokens."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from clustering.errors import UserError, first_line
from clustering.files import read_object
from xelm.config import StartToken
from xelm.data.special_tokens import SpecialTokens, encodings, ids_of
from xelm.data.text_format import TextFormat
from xelm.data.unicode import normalised

# Files with the pieces of a tokenizer. If all are missing, transformers makes a tokenizer that
# has special tokens alone.
_PIECES = (
    "tokenizer.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
# Texts of one length: a damaged tokenizer, which gives no ids or unknown ids, gives both the same.
PROBES = ("sea", "old")


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a checkpoint's directory has the pieces of a tokenizer."""
    return any((Path(directory) / name).is_file() for name in _PIECES)


def load(directory: str | Path, start_token: StartToken = "tokenizer") -> "Tokenizer":
    """The tokenizer in a checkpoint's directory; code in that directory is never run. UserError for
    one that reads no text. start_token: as `RunConfig.start_token`."""
    import transformers

    if not has_tokenizer(directory):
        tekken = (Path(directory) / "tekken.json").is_file()
        fetch = f"hf download OWNER/NAME --include 'tokenizer*' --local-dir {directory}"
        raise UserError(
            f"{directory} has no tokenizer; wanted {' or '.join(_PIECES)}"
            + (f" (tekken.json is not read; download its other form: {fetch})" if tekken else "")
        )
    try:
        hub = transformers.AutoTokenizer.from_pretrained(
            str(directory),
            trust_remote_code=False,
            local_files_only=True,
            # Where mistral-common is installed, tekken.json would be read in its place.
            mistral_format=False,
        )
    except Exception as error:  # the tokenizers library knows no other type
        raise UserError(
            f"{directory} has no tokenizer that transformers can load: {first_line(error)}"
        ) from error
    if not hub.is_fast:
        raise UserError(f"{directory} has no tokenizer.json, and transformers cannot make one")
    start_id, end_ids = _config_start_id(Path(directory)), _end_ids(Path(directory))
    tokenizer = Tokenizer(hub, start_token=start_token, config_start_id=start_id, end_ids=end_ids)
    # Damaged files can load, too, with pieces that are in no text.
    first, second = tokenizer.encode(PROBES)
    if first == second:
        raise UserError(
            f"the tokenizer of {directory} has no piece of plain text: "
            f"{' and '.join(map(repr, PROBES))} both become {first}"
        )
    return tokenizer


def encode(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    """Subword ids of each text by a tokenizer of the tokenizers library, in Unicode's composed form
    and without special tokens: "</s>" in a text is four characters."""
    return ids_of(backend, [normalised(text) for text in texts])


def _end_ids(directory: Path) -> list[int]:
    """End tokens that generation_config.json names, or else config.json."""
    for name in ("generation_config.json", "config.json"):
        found = _entries(directory / name).get("eos_token_id")
        if found is not None:
            return found if isinstance(found, list) else [found]
    return []


def _config_start_id(directory: Path) -> int | None:
    """Token before a document in pre-training, if config.json says it."""
    entries = _entries(directory / "config.json")
    # BLOOM has a bos that its training did not use: documents were separated by the end token.
    name = "eos_token_id" if entries.get("model_type") == "bloom" else "bos_token_id"
    found = entries.get(name)
    return found if isinstance(found, int) else None


def _entries(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


class Tokenizer:
    """A transformers tokenizer (`.hub`) with the functions that xelm needs."""

    def __init__(
        self,
        hub: Any,
        *,
        start_token: StartToken = "tokenizer",
        config_start_id: int | None = None,
        end_ids: Iterable[int] = (),
    ):
        """config_start_id, end_ids: start and end tokens in the checkpoint's configuration."""
        self.hub = hub
        self.special = SpecialTokens(hub)
        # BERT and its descendants have a separator as their end.
        end = hub.sep_token_id if hub.eos_token_id is None else hub.eos_token_id
        if end is None:
            raise UserError(f"the tokenizer {hub.name_or_path} has no end-of-sequence token")
        self.end_id: int = end
        named = [id for id in (config_start_id, *end_ids) if id is not None]
        special = {*self.special.ids.values(), *hub.added_tokens_decoder}
        self.ignored: tuple[int, ...] = tuple(sorted({id for id in named if id not in special}))
        """Ids that the configuration names as special tokens and that are pieces of text here."""
        if config_start_id in self.ignored:
            config_start_id = None
        self.start_id: int | None = _start_id(hub, start_token, config_start_id)
        """As in `TextFormat`, like `mask_id`."""
        bos = (self.start_id, hub.bos_token_id, hub.cls_token_id)
        self.prefix_id: int = next((id for id in bos if id is not None), self.end_id)
        """Token before a text whose first token has to be predicted: start, bos, cls or end."""
        self.mask_id: int | None = hub.mask_token_id
        self.size: int = len(hub)
        self.end_ids: frozenset[int] = frozenset({self.end_id, *end_ids} - {*self.ignored})
        """Ids that end a continuation."""

    def starts(self, ids: Sequence[int] | Int[np.ndarray, " _"]) -> int:
        """Number of first ids that are no text: 1 for the start token or `prefix_id`, else 0."""
        return int(len(ids) > 0 and ids[0] in (self.start_id, self.prefix_id))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Subword ids of each text, as the function `encode`."""
        return encode(self.special.plain, texts)

    def encode_after(self, context: str, text: str) -> tuple[list[int], int]:
        """Subword ids of a context and the text after it, tokenised as one text, and the number of
        ids of the context alone: a token with characters of both counts with the text."""
        before, whole = normalised(context), normalised(context + text)
        # The first character of the text may compose with the last one of the context.
        border = _shared(before, whole)
        (alone,) = self.encode([before])
        (encoding,) = encodings(self.special.plain, [whole])
        ids, ends = encoding.ids, [end for _, end in encoding.offsets]
        # Both counts may only be too small: several tokens of one character have the same end, and
        # the context alone may be tokenised otherwise.
        by_place = next((n for n, end in enumerate(ends) if end > border), len(ids))
        by_ids = _shared(alone, ids)
        return ids, max(by_place, by_ids)

    def encode_with_masks(self, text: str) -> list[int]:
        """Subword ids of a text in which the tokenizer's mask stands for itself."""
        if self.mask_id is None:
            return self.encode([text])[0]
        return self.special.encode_with(self.hub.mask_token, text)

    @functools.cached_property
    def text_format(self) -> TextFormat:
        """Special tokens around and within the text that models of this tokenizer read."""
        return TextFormat(
            start_id=self.start_id,
            end_id=self.end_id,
            mask_id=self.mask_id,
            ordinary_ids=None if self.mask_id is None else self.ordinary_ids(),
        )

    def check_mask(self) -> None:
        """Raises UserError if there is no mask token, which encoders need."""
        if self.mask_id is None:
            raise UserError(
                f"the tokenizer {self.hub.name_or_path} has no mask token, which an encoder needs"
            )

    def ordinary_ids(self) -> Int[np.ndarray, " _"]:
        """Ids that are no special tokens, ascending, int64."""
        special = {*self.special.ids.values()}
        return np.asarray(sorted(set(self.hub.get_vocab().values()) - special), np.int64)

    def rows(self) -> int:
        """Number of rows that an embedding must have. Special tokens at the end that occur in no
        text, such as one for pictures, need no row."""
        named = (self.prefix_id, self.end_id, self.mask_id or 0)
        return 1 + max(*named, *self.ordinary_ids()[-1:].tolist())

    def piece(self, token: int) -> str:
        """A token as it is written within a text, with a space before it if it begins a word; the
        name of a special token."""
        if token in self.hub.all_special_ids:
            return self.hub.convert_ids_to_tokens(token)
        (before,) = self.encode(["a"])
        return self.decode([*before, token]).removeprefix(self.decode(before))

    def begin(self, text: str) -> list[int]:
        """Subword ids of a text to be continued, with its start token; `prefix_id` if it is
        empty."""
        return [*self.text_format.start_ids, *self.encode([text])[0]] or [self.prefix_id]

    def chat(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None
    ) -> tuple[list[int], list[bool] | None]:
        """Subword ids of a chat that the model is to answer, rendered by `SpecialTokens.render`,
        and whether each has characters of the user's text, as `SpecialTokens.encode`."""
        return self.special.encode(self.special.render(messages, options=options))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of subword ids; special tokens are left out."""
        return self.hub.decode(list(ids), skip_special_tokens=True)


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of first items that are equal in both."""
    pairs = enumerate(zip(one, other))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _start_id(hub: Any, start_token: StartToken, config_start_id: int | None) -> int | None:
    """Token before every text; None for none."""
    own = _before_texts(hub)
    if start_token == "bos" or start_token == "eos":
        found = hub.bos_token_id if start_token == "bos" else hub.eos_token_id
        if found is None:
            raise UserError(
                f"start_token is {start_token}; the tokenizer {hub.name_or_path} has no such token"
            )
        return found
    # The texts of an encoder always begin with a token, which is not predicted.
    if own is not None or (start_token == "tokenizer" and hub.mask_token_id is None):
        return own
    starts = (config_start_id, hub.bos_token_id, hub.cls_token_id, hub.eos_token_id)
    return next((id for id in starts if id is not None), None)


def _before_texts(hub: Any) -> int | None:
    """Token that the tokenizer itself puts before a text: </s> of XGLM, <s> of Llama, or none."""
    whole, bare = (hub(PROBES[0], add_special_tokens=some)["input_ids"] for some in (True, False))
    before = len(whole) - len(bare)
    while before and whole[before : before + len(bare)] != bare:
        before -= 1
    if before > 1:
        raise UserError(
            f"the tokenizer {hub.name_or_path} puts {before} tokens before a text; wanted 0 or 1"
        )
    return whole[0] if before else None
