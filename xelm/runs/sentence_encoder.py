"""Folders of sentence-transformers, in which a transformer is one of several modules."""

import json
from collections.abc import Mapping
from pathlib import Path

from clustering.errors import UserError
from clustering.files import read_text

MODULES = "modules.json"
"""List of the modules of such a folder, each with its type and its own folder."""


def body_of(directory: str | Path) -> Path:
    """The checkpoint directory of the transformer in a folder of sentence-transformers; any other
    directory as it is. UserError for a folder without a transformer."""
    directory = Path(directory)
    if not (directory / MODULES).is_file():
        return directory
    try:
        modules = json.loads(read_text(directory / MODULES))
    except ValueError as error:
        raise UserError(f"{directory / MODULES} is not valid JSON: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(each, Mapping) for each in modules):
        raise UserError(f"{directory / MODULES} must be a list of modules")
    # A type is the path of a class. It is never imported: the configuration says what the body is.
    kinds = [str(each.get("type")) for each in modules]
    places = [each.get("path") for each, kind in zip(modules, kinds) if _is_transformer(kind)]
    if not places:
        raise UserError(
            f"{directory} is a folder of sentence-transformers without a transformer (its modules: "
            f"{', '.join(kinds)}); a seed is a language model, such as FacebookAI/xlm-roberta-base"
        )
    body = (directory / str(places[0] or "")).resolve()
    if not body.is_relative_to(directory.resolve()):
        raise UserError(f"{directory / MODULES} names a folder elsewhere: {places[0]}")
    return directory if body == directory.resolve() else body


def _is_transformer(kind: str) -> bool:
    return kind.rpartition(".")[2] == "Transformer"
