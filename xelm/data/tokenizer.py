"""Tokenizers: trains sentencepiece for a fresh seed, and loads those of checkpoints.

A trained tokenizer is written so that `transformers.AutoTokenizer` loads it and gives the ids that
sentencepiece gives.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from clustering.errors import UserError
from clustering.files import read_object
from xelm.config import StartToken
from xelm.data.special_tokens import SpecialTokens, ids_of
from xelm.data.text_format import TextFormat
from xelm.data.unicode import normalised

# One of them holds the pieces. Without any, transformers makes a tokenizer of the special tokens.
PIECE_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
# Of one length: what makes nothing of a text, or unknown ids alone, cannot tell them apart.
PROBES = ("sea", "old")


def load(directory: str | Path, start_token: StartToken = "tokenizer") -> "Tokenizer":
    """The tokenizer that lies beside a checkpoint; code that lies there too is never run. One that
    reads no text is refused. start_token: as `RunConfig.start_token`."""
    import transformers

    if not any((Path(directory) / name).is_file() for name in PIECE_FILES):
        tekken = (Path(directory) / "tekken.json").is_file()
        fetch = f"hf download OWNER/NAME --include 'tokenizer*' --local-dir {directory}"
        raise UserError(
            f"{directory} has no tokenizer; wanted {' or '.join(PIECE_FILES)}"
            + (f" (tekken.json is not read; fetch the other form of it: {fetch})" if tekken else "")
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
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{directory} has no tokenizer that transformers can load: {reason}"
        ) from error
    if not hub.is_fast:
        raise UserError(f"{directory} has no tokenizer.json, and transformers can make none of it")
    tokenizer = Tokenizer(
        hub,
        start_token=start_token,
        config_start_id=_config_start_id(Path(directory)),
        end_ids=_end_ids(Path(directory)),
    )
    # Damaged files can load, too: as pieces of which no text is made.
    first, second = tokenizer.encode(PROBES)
    if first == second:
        raise UserError(
            f"the tokenizer of {directory} knows no piece of plain text: "
            f"{' and '.join(map(repr, PROBES))} both become {first}"
        )
    return tokenizer


def encode(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    """Subword ids of each text by a tokenizer of the tokenizers library, in Unicode's composed form
    and without special tokens: "</s>" in a text is four characters."""
    return ids_of(backend, [normalised(text) for text in texts])


def _end_ids(directory: Path) -> list[int]:
    """The ends that a checkpoint names, such as that of a chat's turn: in generation_config.json,
    or else in config.json."""
    for name in ("generation_config.json", "config.json"):
        found = _entries(directory / name).get("eos_token_id")
        if found is not None:
            return found if isinstance(found, list) else [found]
    return []


def _config_start_id(directory: Path) -> int | None:
    """What stands before a document in pre-training as far as config.json says: after a chat's
    training, other tokens may end a text."""
    entries = _entries(directory / "config.json")
    # BLOOM has a bos that its training did not use: documents were parted by the end.
    name = "eos_token_id" if entries.get("model_type") == "bloom" else "bos_token_id"
    found = entries.get(name)
    return found if isinstance(found, int) else None


def _entries(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


class Tokenizer:
    """What xelm needs of a transformers tokenizer, which stays reachable as `.hub`."""

    def __init__(
        self,
        hub: Any,
        *,
        start_token: StartToken = "tokenizer",
        config_start_id: int | None = None,
        end_ids: Iterable[int] = (),
    ):
        """config_start_id, end_ids: what the checkpoint's configuration says of the start and the
        ends of texts; ids that are no special tokens of the tokenizer are `ignored`."""
        self.hub = hub
        self.special = SpecialTokens(hub)
        # Encoders of the BERT line have a separator there.
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
        """What stands before every text; None: nothing, and the first token is not predicted."""
        bos = (self.start_id, hub.bos_token_id, hub.cls_token_id)
        self.prefix_id: int = next((id for id in bos if id is not None), self.end_id)
        """What stands before a text of which the first token is predicted all the same: the start,
        or else the tokenizer's bos or eos (as in the evaluation harness)."""
        self.mask_id: int | None = hub.mask_token_id
        """What stands for a hidden token, in tokenizers of encoders."""
        self.size: int = len(hub)
        self.end_ids: frozenset[int] = frozenset({self.end_id, *end_ids} - {*self.ignored})
        """Ids that end a continuation."""

    @property
    def start_ids(self) -> list[int]:
        """What stands before every text: one id or none."""
        return [] if self.start_id is None else [self.start_id]

    def starts(self, ids: Sequence[int] | Int[np.ndarray, " _"]) -> int:
        """How many of the first ids say nothing of a text: 1 where it begins with the token that
        starts texts, or with what may stand in its place; else 0."""
        return int(len(ids) > 0 and ids[0] in (self.start_id, self.prefix_id))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Subword ids of each text, in Unicode's composed form and without special tokens: "</s>"
        in a text is four characters. UserError for half of a surrogate pair."""
        return encode(self.special.plain, texts)

    def encode_after(self, context: str, text: str) -> tuple[list[int], int]:
        """Subword ids of a text behind its context, cut as one text, and how many of them are of
        the context alone: a token that has characters of both counts with the text."""
        before, whole = normalised(context), normalised(context + text)
        # What the text begins with may compose with the context's last character.
        border = _shared(before, whole)
        (alone,) = self.encode([before])
        (encoding,) = self.special.plain.encode_batch([whole], add_special_tokens=False)
        ids, ends = encoding.ids, [end for _, end in encoding.offsets]
        # Both count too few where they err: several tokens of one character end where it does, and
        # the context alone may be cut otherwise.
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
        ordinary_ids = None if self.mask_id is None else self.ordinary_ids()
        return TextFormat(
            start_id=self.start_id,
            end_id=self.end_id,
            mask_id=self.mask_id,
            ordinary_ids=ordinary_ids,
        )

    def check_mask(self) -> None:
        """Raises UserError if there is no mask token, which encoders need."""
        if self.mask_id is None:
            raise UserError(
                f"the tokenizer {self.hub.name_or_path} has no mask token, which an encoder needs"
            )

    def ordinary_ids(self) -> Int[np.ndarray, " _"]:
        """Ids that are no special tokens, ascending."""
        special = {*self.special.ids.values()}
        return np.asarray(sorted(set(self.hub.get_vocab().values()) - special), np.int64)

    def rows(self) -> int:
        """Rows that an embedding must have. Special tokens at the end that no text becomes, such as
        one for pictures, need none."""
        named = (self.prefix_id, self.end_id, self.mask_id or 0)
        return 1 + max(*named, *self.ordinary_ids()[-1:].tolist())

    def piece(self, token: int) -> str:
        """A token as it reads within a text: with a space before it if it begins a word. Special
        tokens have their names."""
        if token in self.hub.all_special_ids:
            return self.hub.convert_ids_to_tokens(token)
        (before,) = self.encode(["a"])
        return self.decode([*before, token]).removeprefix(self.decode(before))

    def begin(self, text: str) -> list[int]:
        """Subword ids of a text that is to be continued, after the token that starts every text, if
        any does; an empty text has one all the same."""
        return [*self.start_ids, *self.encode([text])[0]] or [self.prefix_id]

    def chat(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Subword ids of a chat that the other side is to continue, by the checkpoint's own
        template, whose special tokens are the only ones. options: values that it knows beside the
        messages, such as enable_thinking."""
        return self.chat_with_user_mask(messages, options)[0]

    def chat_with_user_mask(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None
    ) -> tuple[list[int], list[bool] | None]:
        """Subword ids of a chat as `chat` has them, and for each whether it has characters of the
        user's text, as opposed to template, system prompt and answers; None if the user says
        nothing, or if the template changes what the user says."""
        return self.special.encode(self.render(messages, options=options))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """As `SpecialTokens.render`; UserError where there is no template."""
        if not self.hub.chat_template:
            raise UserError(
                f"the tokenizer {self.hub.name_or_path} has no chat template; give a plain text"
            )
        return self.special.render(
            messages, add_generation_prompt=add_generation_prompt, options=options
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of subword ids; special tokens are left out."""
        return self.hub.decode(list(ids), skip_special_tokens=True)


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    pairs = enumerate(zip(one, other))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _start_id(hub: Any, start_token: StartToken, config_start_id: int | None) -> int | None:
    """What stands before every text."""
    own = _before_texts(hub)
    if start_token == "bos" or start_token == "eos":
        found = hub.bos_token_id if start_token == "bos" else hub.eos_token_id
        if found is None:
            raise UserError(
                f"start_token is {start_token}; the tokenizer {hub.name_or_path} has no such token"
            )
        return found
    # An encoder's texts always begin with a token, which is not guessed.
    if own is not None or (start_token == "tokenizer" and hub.mask_token_id is None):
        return own
    starts = (config_start_id, hub.bos_token_id, hub.cls_token_id, hub.eos_token_id)
    return next((id for id in starts if id is not None), None)


def _before_texts(hub: Any) -> int | None:
    """What the tokenizer itself puts before a text: XGLM's </s>, Llama's <s>, others' nothing."""
    whole, bare = (hub(PROBES[0], add_special_tokens=added)["input_ids"] for added in (True, False))
    before = len(whole) - len(bare)
    while before and whole[before : before + len(bare)] != bare:
        before -= 1
    if before > 1:
        raise UserError(
            f"the tokenizer {hub.name_or_path} puts {before} tokens before a text; wanted at most "
            "one"
        )
    return whole[0] if before else None
