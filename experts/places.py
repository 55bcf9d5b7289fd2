"""Local paths in what is shared: a reader needs the names of files and folders, and has no use for
the folders of the machine that they lay in."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from experts.expert import Expert
from experts.history import Event
from experts.registry import Registry


def name_of(place: str) -> str:
    """The last part of an absolute path; any other text as it is."""
    return PurePath(place).name if place.startswith(("/", "~")) else place


def without_folders(value: Any, key: str = "") -> Any:
    """A JSON value in which absolute paths have become their last parts, and those in commands
    too: texts under the key "command"."""
    if isinstance(value, Mapping):
        return {name: without_folders(inside, name) for name, inside in value.items()}
    if isinstance(value, list):
        return [without_folders(inside) for inside in value]
    if not isinstance(value, str):
        return value
    return _command(value) if key == "command" else name_of(value)


def registry_to_share(registry: Registry) -> Registry:
    """The registry of a RUN without its versions in training, whose files are not shared, without
    its pushes, so that a second push finds the same file, and without local folders."""
    experts = tuple(to_share(expert) for expert in registry.experts if expert.status != "training")
    history = tuple(
        Event.from_json(without_folders(event.to_json()), "history")
        for event in registry.history
        if event.action != "push"
    )
    return replace(registry, experts=experts, history=history)


def to_share(expert: Expert) -> Expert:
    """The record of an expert without local folders."""
    facts = {"data": without_folders(expert.data), "made": without_folders(expert.made)}
    return replace(expert, **facts)


def _command(line: str) -> str:
    try:
        words = shlex.split(line)
    except ValueError:  # a quotation mark without another
        words = line.split()
        return " ".join(_word(word) for word in words)
    return shlex.join(_word(word) for word in words)


def _word(word: str) -> str:
    option, equals, value = word.partition("=")
    return f"{option}={name_of(value)}" if equals and option.startswith("-") else name_of(word)
