"""Special tokens within text: those of a chat template, never those that a message spells.

A chat is rendered to a string and then becomes ids. So that "</s>" in a message stays four
characters, the messages are marked before they are rendered: `ESCAPE` is put after each character
with which the name of a special token might begin, so that no such name is found there. The marks
are removed before the text becomes ids. They are noncharacters of Unicode, which no text may have.
Two more of them enclose the user's text, so that its place in the rendered chat is known.
"""

import functools
import inspect
import itertools
import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clustering.errors import UserError
from xelm.data.unicode import normalised

RENDERED = "\ufdd0"
"""First character of a rendered chat, where names of special tokens mean the tokens."""
ESCAPE = "\ufdd1"
"""Mark within a name that is to stay text."""
_STAND_IN = "\ufdd2"
USER_BEGINS, USER_ENDS = "\ufdd3", "\ufdd4"
"""Marks in a rendered chat around the text of each of the user's messages."""
_NONCHARACTERS = re.compile(f"[{RENDERED}{ESCAPE}{_STAND_IN}{USER_BEGINS}{USER_ENDS}]")
_USER_MARKS = re.compile(f"[{USER_BEGINS}{USER_ENDS}]")
_FIRST_STAND_IN = 0xF0000
"""First character of Unicode's private plane; after `_STAND_IN` it names an ordinary token."""

_SETTINGS = threading.Lock()
"""Held while a tokenizer of the library has the settings of one call."""


class SpecialTokens:
    """The special tokens of a tokenizer; encodes text in which some names mean these tokens."""

    def __init__(self, hub: Any):
        self._hub = hub
        added = hub.added_tokens_decoder.items()
        self.ids: dict[str, int] = {token.content: id for id, token in added if token.special}
        """Name -> id."""
        named = zip(hub.all_special_tokens, hub.all_special_ids)
        self.ids |= {name: id for name, id in named if name and name not in self.ids}
        self._numbers = {name: number for number, name in enumerate(self.ids)}
        self._names = _any_of(self.ids)
        self._beginnings = _any_of({name[0] for name in self.ids})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """A chat as text for `encode`, by the checkpoint's own template. add_generation_prompt: the
        model is to answer; otherwise it continues the last message. options: values that the
        template reads besides the messages, such as enable_thinking. UserError for messages that
        the template refuses, and where there is no template."""
        if not self._hub.chat_template:
            raise UserError(
                f"the tokenizer {self._hub.name_or_path} has no chat template; give a plain text"
            )
        given = self._checked({"messages": list(messages), "options": dict(options or {})})
        known = inspect.signature(self._hub.apply_chat_template).parameters
        if taken := [name for name in given["options"] if name in known]:
            raise UserError(f"a chat template has no option {taken[0]!r}")

        def made(marked: Mapping[str, Any]) -> str:
            try:
                return self._hub.apply_chat_template(
                    marked["messages"],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                    **marked["options"],
                )
            except Exception as error:  # a template is a program, which raises what it likes
                raise UserError(f"the chat template refuses these messages: {error}") from None

        plain, rendered = made(given), ""
        with_user = given | {"messages": [_with_user_marks(m) for m in given["messages"]]}
        # Some templates search the messages, as for "</think>". They find it if only whole names of
        # special tokens are marked, not if every "<" is. Others look at the beginning of the user's
        # text, which must then not be marked.
        patterns = (self._beginnings, self._names)
        for marked, pattern in itertools.product((with_user, given), patterns):
            rendered = made(_mapped(marked, functools.partial(_marked, pattern)))
            if _USER_MARKS.sub("", rendered).replace(ESCAPE, "") == plain:
                break
        return RENDERED + (rendered if self._spells(rendered) else rendered.replace(ESCAPE, ""))

    def escape(self, text: str) -> str:
        """A text marked for use within a rendered chat, as a part of a message."""
        return _marked(self._beginnings, self._checked(text))

    def encode(self, rendered: str) -> tuple[list[int], list[bool] | None]:
        """Subword ids of a rendered chat, with the template's special tokens alone: the ids of
        `apply_chat_template`, if no message spells a special token. And whether each id has a
        character of the user's text, as opposed to template, system prompt and answers; None if the
        user has no text, or if the template changes it."""
        rendered = rendered.removeprefix(RENDERED)
        if spells := self._spells(rendered):
            backend, special_ids = self._with_stand_ins
            text = self._with_names(self._names, rendered)
        else:
            backend, special_ids = self._hub.backend_tokenizer, {}
            text = rendered.replace(ESCAPE, "")
        text, spans = _without_user_marks(text)
        (encoding,) = encodings(backend, [text], special=not spells)
        ids = [special_ids.get(id, id) for id in encoding.ids]
        places = encoding.offsets
        mask = [any(begin < last and first < end for first, last in spans) for begin, end in places]
        return ids, mask if spans else None

    def encode_with(self, name: str, text: str) -> list[int]:
        """Subword ids of a text in which the name of one special token means that token."""
        text = self._with_names(_any_of([name]), self._checked(text))
        backend, special_ids = self._with_stand_ins
        return [special_ids.get(id, id) for id in ids_of(backend, [text])[0]]

    def _spells(self, rendered: str) -> bool:
        """Whether there are more names of special tokens without the marks than with them."""
        if ESCAPE not in rendered:
            return False
        rendered = _USER_MARKS.sub("", rendered)
        found = self._names.findall(rendered)
        return found != self._names.findall(rendered.replace(ESCAPE, ""))

    def _with_names(self, names: re.Pattern[str], text: str) -> str:
        """A text with stand-ins where `names` finds special tokens, and without escapes."""
        text = names.sub(lambda found: _stand_in(self._numbers[found[0]], written=True), text)
        return text.replace(ESCAPE, "")

    @functools.cached_property
    def plain(self) -> Any:
        """The tokenizer of the tokenizers library that makes ids of text: the checkpoint's own, or,
        if its model takes the name of a special token for an ordinary piece (as XLM-R's and XGLM's
        do), a copy in which these pieces have other names."""
        import tokenizers

        backend, unknown = self._hub.backend_tokenizer, self._hub.unk_token
        names = [name for name in self.ids if name != unknown]
        if not any(_spelt(backend, name, self.ids[name]) for name in names):
            return backend
        content = json.loads(backend.to_str())
        # The unknown token of the model must keep its name, also where transformers has none.
        names = [name for name in names if name != content["model"].get("unk_token")]
        pieces = content["model"]["vocab"]
        new_names = {name: _stand_in(self._numbers[name]) for name in names}
        # Special tokens that are no pieces of the model stay, so that all keep their ids.
        if isinstance(pieces, dict):
            gone = {*names} & {*pieces}
            renamed = {new_names.get(piece, piece): id for piece, id in pieces.items()}
        else:
            gone = {*names} & {piece for piece, _ in pieces}
            renamed = [[new_names.get(piece, piece), score] for piece, score in pieces]
        content["model"]["vocab"] = renamed
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in gone]
        return tokenizers.Tokenizer.from_str(json.dumps(content))

    @functools.cached_property
    def _with_stand_ins(self) -> tuple[Any, Mapping[int, int]]:
        """A tokenizer with one more ordinary token for each special token, which splits a text as
        the special one does; and ids of these ordinary tokens -> ids of the special ones. It does
        not search text for special tokens."""
        import tokenizers

        copy = tokenizers.Tokenizer.from_str(self.plain.to_str())
        like = {token.content: token for token in self._hub.added_tokens_decoder.values()}
        ids: dict[int, int] = {}
        for name, number in self._numbers.items():
            form = like.get(name, tokenizers.AddedToken(name))
            kept = {side: getattr(form, side) for side in ("lstrip", "rstrip", "single_word")}
            stand_in = _stand_in(number, written=True)
            token = tokenizers.AddedToken(stand_in, normalized=False, special=False, **kept)
            copy.add_tokens([token])
            id = copy.token_to_id(token.content)
            assert id is not None
            ids[id] = self.ids[name]
        return copy, ids

    def _checked(self, value: Any) -> Any:
        """The messages with all texts in Unicode's composed form."""

        def check(text: str) -> str:
            if found := _NONCHARACTERS.search(text):
                raise UserError(
                    f"a text has no noncharacters of Unicode; got U+{ord(found[0]):04X} at "
                    f"character {found.start() + 1}"
                )
            return normalised(text)

        return _mapped(value, check)


def ids_of(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    """Subword ids of each text by a tokenizer of the tokenizers library, without special tokens.
    (What transformers adds to the ids costs a third of its time.)"""
    return [encoding.ids for encoding in encodings(backend, texts, fast=True)]


def encodings(
    backend: Any, texts: Sequence[str], *, special: bool = False, fast: bool = False
) -> list[Any]:
    """Encodings of texts by the tokenizers library, without start and end. special: names of
    special tokens mean these tokens. fast: without offsets of characters."""
    encode = backend.encode_batch_fast if fast else backend.encode_batch
    # The settings are the tokenizer's: other threads, and calls of transformers, change them.
    with _SETTINGS:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = not special
        return encode(list(texts), add_special_tokens=False)


def _spelt(backend: Any, name: str, id: int) -> bool:
    """Whether a text with the name of a special token becomes that token."""
    try:
        return any(id in ids for ids in ids_of(backend, [name, f"a{name}b"]))
    except Exception:  # a model of words alone raises it; the library has no other type
        return False


def _mapped(value: Any, change: Any) -> Any:
    """The value with `change` applied to every text in it, but not to names of entries."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(entry, change) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(entry, change) for entry in value]
    return value


def _marked(pattern: re.Pattern[str], text: str) -> str:
    return pattern.sub(lambda found: found[0][0] + ESCAPE + found[0][1:], text)


def _with_user_marks(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message with marks around its text if it is the user's. Spaces at either end stay outside
    the marks, so that a template can strip them."""
    text = message.get("content")
    if message.get("role") != "user" or not isinstance(text, str) or not text.strip():
        return message
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    marked = f"{text[:first]}{USER_BEGINS}{text[first:last]}{USER_ENDS}{text[last:]}"
    return {**message, "content": marked}


def _without_user_marks(rendered: str) -> tuple[str, list[tuple[int, int]]]:
    """A rendered chat without the marks of the user's text, and [begin, end) of each such text."""
    spans, first = [], 0
    for number, found in enumerate(_USER_MARKS.finditer(rendered)):
        place = found.start() - number  # number of marks removed before it
        if found[0] == USER_BEGINS:
            first = place
        else:
            spans.append((first, place))
    return _USER_MARKS.sub("", rendered), spans


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Pattern of these names, the longest first, unless they are marked."""
    ordered = sorted(names, key=lambda name: -len(name))
    return re.compile(f"(?:{'|'.join(map(re.escape, ordered))})(?!{ESCAPE})" if ordered else "(?!)")


def _stand_in(number: int, *, written: bool = False) -> str:
    """Name of an ordinary token that stands for a special one. written: as in a text that becomes
    ids; otherwise with a space, which no piece of a text contains."""
    return ("" if written else " ") + _STAND_IN + chr(_FIRST_STAND_IN + number)
