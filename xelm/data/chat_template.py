"""Finds the values that a chat template reads besides the messages, without rendering it."""

import functools
import inspect
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from clustering.errors import UserError

_NEVER_OPTIONS = {"messages", "raise_exception", "strftime_now"}
"""Names that rendering sets besides parameters of `apply_chat_template` and special tokens."""


class _Generation(Extension):
    """Tag around a model's answer, which transformers adds to the language of templates."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Content of the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_options(hub: Any) -> frozenset[str]:
    """Names of the values that the chat template of a transformers tokenizer (`hub`) reads beside
    the messages, such as enable_thinking. UserError for an invalid template."""
    known = inspect.signature(hub.apply_chat_template).parameters
    special = {*hub.SPECIAL_TOKENS_ATTRIBUTES, *hub.special_tokens_map}
    read = _variables(hub.get_chat_template())
    return read - _NEVER_OPTIONS - special - set(known)


@functools.lru_cache(maxsize=8)
def _variables(template: str) -> frozenset[str]:
    """Names that a template reads and that it does not set itself before."""
    language = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
    try:
        return frozenset(meta.find_undeclared_variables(language.parse(template)))
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template is invalid: {error}") from None
