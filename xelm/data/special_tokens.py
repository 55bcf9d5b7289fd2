"""Special tokens within text: those of a chat's template, never those that a message spells.

A chat is rendered to a string and then becomes ids. So that "</s>" in a message stays four
characters, the messages are marked before the template sees them: behind each character with which
the name of a special token might begin stands `ESCAPE`, so that no such name is found there. The
marks go before the text becomes ids. They are noncharacters of Unicode, which no text may have. Two
more of them stand around what the user says, so that its place in the rendered chat is known.
"""

import functools
import inspect
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clustering.errors import UserError
from xelm.data.unicode import normalised

RENDERED = "\ufdd0"
"""Begins a rendered chat, in which the names of special tokens are the tokens themselves."""
ESCAPE = "\ufdd1"
"""Stands within a name that is to stay text."""
_STAND_IN = "\ufdd2"
USER_BEGINS, USER_ENDS = "\ufdd3", "\ufdd4"
"""Stand in a rendered chat around the text of each of the user's messages."""
_NONCHARACTERS = re.compile(f"[{RENDERED}{ESCAPE}{_STAND_IN}{USER_BEGINS}{USER_ENDS}]")
_USER_MARKS = re.compile(f"[{USER_BEGINS}{USER_ENDS}]")
_FIRST_STAND_IN = 0xF0000
"""Of Unicode's private plane; with `_STAND_IN` before it, the name of an ordinary token."""


class SpecialTokens:
    """The special tokens of a tokenizer, and text in which some of them stand for themselves."""

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
        """A chat by the checkpoint's own template, for `encode`. add_generation_prompt: the other
        side is to continue; otherwise the last message is. options: values that the template knows
        beside the messages. UserError for messages that the template refuses."""
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
            except (
                Exception
            ) as error:  # a template is a program of its own; it raises what it likes
                raise UserError(f"the chat template refuses these messages: {error}") from None

        plain, rendered = made(given), ""
        with_user = given | {"messages": [_with_user_marks(m) for m in given["messages"]]}
        # Some templates look into messages, as for "</think>". They find nothing where every "<" is
        # marked, but do where whole names of special tokens alone are; and some look at where the
        # user's text begins, which is not marked then.
        patterns = (self._beginnings, self._names)
        for messages, pattern in itertools.product((with_user, given), patterns):
            rendered = made(_mapped(messages, functools.partial(_marked, pattern)))
            if _USER_MARKS.sub("", rendered).replace(ESCAPE, "") == plain:
                break
        return RENDERED + (rendered if self._spells(rendered) else rendered.replace(ESCAPE, ""))

    def escape(self, text: str) -> str:
        """A text that is to stand within a rendered chat, as part of what was said."""
        return _marked(self._beginnings, self._checked(text))

    def encode(self, rendered: str) -> tuple[list[int], list[bool] | None]:
        """Subword ids of a rendered chat, with no other special tokens than the template has: those
        of `apply_chat_template`, if no message spells a special token. And for each id whether any
        of its characters is of the user's text; None where no such text is marked."""
        rendered = rendered.removeprefix(RENDERED)
        if spells := self._spells(rendered):
            backend, special_ids = self._with_stand_ins
            text = self._with_names(self._names, rendered)
        else:
            backend, special_ids = self._hub.backend_tokenizer, {}
            text = rendered.replace(ESCAPE, "")
        text, spans = _without_user_marks(text)
        (encoding,) = _encodings(backend, [text], special=not spells, fast=False)
        ids = [special_ids.get(id, id) for id in encoding.ids]
        if not spans:
            return ids, None
        mask = [
            any(begin < last and first < end for first, last in spans)
            for begin, end in encoding.offsets
        ]
        return ids, mask

    def encode_with(self, name: str, text: str) -> list[int]:
        """Subword ids of a text in which one special token stands for itself."""
        text = self._with_names(_any_of([name]), self._checked(text))
        backend, ids = self._with_stand_ins
        return [ids.get(id, id) for id in ids_of(backend, [text])[0]]

    def _spells(self, rendered: str) -> bool:
        """Whether there are more names of special tokens without the marks than with them."""
        if ESCAPE not in rendered:
            return False
        rendered = _USER_MARKS.sub("", rendered)
        found = self._names.findall(rendered)
        return found != self._names.findall(rendered.replace(ESCAPE, ""))

    def _with_names(self, names: re.Pattern[str], text: str) -> str:
        """A text with stand-ins where `names` finds special tokens, and without escapes."""
        numbers = self._numbers
        text = names.sub(lambda found: _stand_in(numbers[found[0]], written=True), text)
        return text.replace(ESCAPE, "")

    @functools.cached_property
    def plain(self) -> Any:
        """The tokenizer of the tokenizers library that makes ids of text. It is that of the
        checkpoint, unless its model takes the name of a special token for a piece like any other,
        as those of XLM-R and XGLM do: then a copy in which these pieces have other names."""
        import tokenizers

        backend, unknown = self._hub.backend_tokenizer, self._hub.unk_token
        names = [name for name in self.ids if name != unknown]
        if not any(_spelt(backend, name, self.ids[name]) for name in names):
            return backend
        content = json.loads(backend.to_str())
        # What a model falls back on must keep its name, also where transformers know of none.
        names = [name for name in names if name != content["model"].get("unk_token")]
        pieces = content["model"]["vocab"]
        new_names = {name: _stand_in(self._numbers[name]) for name in names}
        if isinstance(pieces, dict):
            pieces = {new_names.get(piece, piece): id for piece, id in pieces.items()}
            named = {*content["model"]["vocab"]}
        else:
            named = {piece for piece, _ in pieces}
            pieces = [[new_names.get(piece, piece), score] for piece, score in pieces]
        content["model"]["vocab"] = pieces
        # Those that are no pieces of the model stay, so that all keep their ids.
        gone = named & {*names}
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in gone]
        return tokenizers.Tokenizer.from_str(json.dumps(content))

    @functools.cached_property
    def _with_stand_ins(self) -> tuple[Any, Mapping[int, int]]:
        """The tokenizer with an ordinary token beside each special one, which cuts a text as that
        does; and ids of the former -> of the latter. Special ones are not looked for in it."""
        import tokenizers

        copy = tokenizers.Tokenizer.from_str(self.plain.to_str())
        like = {token.content: token for token in self._hub.added_tokens_decoder.values()}
        ids: dict[int, int] = {}
        for name, number in self._numbers.items():
            form = like.get(name, tokenizers.AddedToken(name))
            token = tokenizers.AddedToken(
                _stand_in(number, written=True),
                lstrip=form.lstrip,
                rstrip=form.rstrip,
                single_word=form.single_word,
                normalized=False,
                special=False,
            )
            copy.add_tokens([token])
            id = copy.token_to_id(token.content)
            assert id is not None
            ids[id] = self.ids[name]
        return copy, ids

    def _checked(self, value: Any) -> Any:
        """Messages with texts in Unicode's composed form."""

        def check(text: str) -> str:
            if found := _NONCHARACTERS.search(text):
                raise UserError(
                    f"a text has no noncharacters of Unicode; got U+{ord(found[0]):04X} at "
                    f"character {found.start() + 1}"
                )
            return normalised(text)

        return _mapped(value, check)


def ids_of(backend: Any, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """Subword ids of each text by a tokenizer of the tokenizers library, with nothing before or
    behind it. special: names of special tokens are those tokens, not characters. (What transformers
    make of a text besides costs a third of the time.)"""
    return [encoding.ids for encoding in _encodings(backend, texts, special=special)]


def _encodings(
    backend: Any, texts: Sequence[str], *, special: bool, fast: bool = True
) -> list[Any]:
    """What the tokenizers library makes of texts; `fast` is without places of characters."""
    # Transformers change these settings at their own calls.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = not special
    encode = backend.encode_batch_fast if fast else backend.encode_batch
    return encode(list(texts), add_special_tokens=False)


def _spelt(backend: Any, name: str, id: int) -> bool:
    """Whether a text with the name of a special token becomes that token."""
    try:
        return any(id in ids for ids in ids_of(backend, [name, f"a{name}b"]))
    except Exception:  # of a model that knows some words and nothing else; the library has no other
        return False


def _mapped(value: Any, change: Any) -> Any:
    """With every text in it changed, but for the names of entries."""
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
    """A message with marks around its text if the user says it. Spaces at either end stay outside,
    so that a template can strip them."""
    text = message.get("content")
    if message.get("role") != "user" or not isinstance(text, str) or not text.strip():
        return message
    first = len(text) - len(text.lstrip())
    last = len(text.rstrip())
    marked = f"{text[:first]}{USER_BEGINS}{text[first:last]}{USER_ENDS}{text[last:]}"
    return {**message, "content": marked}


def _without_user_marks(rendered: str) -> tuple[str, list[tuple[int, int]]]:
    """A rendered chat without the marks of the user's text, and the characters between them."""
    spans, first = [], 0
    for number, found in enumerate(_USER_MARKS.finditer(rendered)):
        place = found.start() - number  # so many marks are gone before it
        if found[0] == USER_BEGINS:
            first = place
        else:
            spans.append((first, place))
    return _USER_MARKS.sub("", rendered), spans


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds any of these, the longest first, unless it is marked."""
    ordered = sorted(names, key=lambda name: -len(name))
    return re.compile(f"(?:{'|'.join(map(re.escape, ordered))})(?!{ESCAPE})" if ordered else "(?!)")


def _stand_in(number: int, *, written: bool = False) -> str:
    """written: within a text that becomes ids; otherwise a name that is found in none, where models
    of pieces see no spaces."""
    return ("" if written else " ") + _STAND_IN + chr(_FIRST_STAND_IN + number)
