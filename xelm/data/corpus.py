"""Descriptions of corpora: a path, or a YAML file of several with their fields and languages.

run.json records the description, so that a RUN that is opened later reads the same text in the same
way.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from clustering.errors import UserError
from clustering.languages import canonical
from xelm.data.hub import SCHEME, Address
from xelm.data.records import UNITS

YAML = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One place with text of a corpus, and how its records are read."""

    path: str
    """A folder, a file, a pattern such as `data/*/train`, or an address on the Hub (`hub`)."""
    language: str | None = None
    """Language of all text there, whatever names and records say; None takes it from these."""
    text_field: str | None = None
    """Name of the field with the text; None is `text`, or `content` in records without it."""
    language_field: str | None = None
    """Name of the field with the language; None is `lang`, and, in files whose names are no
    language, `language`."""
    languages: Mapping[str, str | None] = field(default_factory=dict)
    """Names, patterns of paths or values of the language field -> code; None leaves them out."""
    unit: str | None = None
    """Unit of a plain text file that is a document: paragraph, line or file. None takes paragraphs,
    or lines if there is no blank line."""
    card: str | None = None
    """File with the data card of this text; None: as `data_card` finds one."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name != "languages" and not isinstance(value, str | None):
                raise UserError(f"{one.name} of a corpus must be a text; got {value!r}")
        if not self.path:
            raise UserError("a source of a corpus needs a path")
        if self.unit not in (None, *UNITS):
            raise UserError(f"unit must be one of {', '.join(UNITS)}; got {self.unit}")
        for code in [self.language, *self.languages.values()]:
            if code is not None:
                canonical(code)
        if self.path.startswith(SCHEME):
            Address.of(self.path)

    def options(self) -> dict[str, Any]:
        """Options besides the path that are set, by name."""
        given = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "path"}
        return {name: value for name, value in given.items() if value}


@dataclass(frozen=True, slots=True)
class Corpus:
    """Text of one or several sources."""

    sources: tuple[Source, ...]

    @staticmethod
    def of(what: "AnyCorpus") -> "Corpus":
        """The corpus that a path, YAML file or record of a RUN describes; UserError if invalid."""
        if isinstance(what, Corpus):
            return what
        if isinstance(what, Mapping):
            return Corpus(tuple(_source(one, Path()) for one in what["sources"]))
        if str(what).lower().endswith(YAML):
            return _read(Path(what))
        return Corpus((Source(path=str(what)),))

    def with_defaults(self, **options: Any) -> "Corpus":
        """The corpus with these options in the sources that do not set them themselves."""
        given = {name: value for name, value in options.items() if value}
        languages = given.get("languages", {})
        own = [
            one.options() | {"languages": {**languages, **one.languages}} for one in self.sources
        ]
        return Corpus(tuple(replace(one, **given | its) for one, its in zip(self.sources, own)))

    def pinned(self) -> "Corpus":
        """The corpus with data sets of the Hub at their newest commits."""
        paths = [
            str(Address.of(one.path).pinned()) if one.path.startswith(SCHEME) else one.path
            for one in self.sources
        ]
        return Corpus(tuple(replace(one, path=path) for one, path in zip(self.sources, paths)))

    def to_json(self) -> str | dict[str, Any]:
        """JSON for run.json, which is read from any folder: the absolute path alone, or all sources
        if there are several or they have options."""
        found = [{"path": one.path, **one.options()} for one in self.sources]
        for one in found:
            if not one["path"].startswith(SCHEME):
                one["path"] = os.path.abspath(one["path"])
            if "card" in one:
                one["card"] = os.path.abspath(one["card"])
        return found[0]["path"] if list(map(len, found)) == [1] else {"sources": found}

    def __str__(self) -> str:
        return ", ".join(one.path for one in self.sources)


AnyCorpus = Corpus | str | Path | Mapping[str, Any]
"""A corpus, or what `Corpus.of` makes one of."""


def read_languages(path: str | Path) -> dict[str, str | None]:
    """The language map of a YAML file with lines such as `als: gsw`; UserError for another file."""
    return _languages(read_yaml(Path(path)), path)


def _languages(found: Any, path: str | Path) -> dict[str, str | None]:
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(code, str | None) for name, code in found.items()
    ):
        raise UserError(
            f"{path} must have lines such as 'als: gsw' or 'notes: null'; names and codes that "
            f"YAML takes for something else need quotes, as 'no'; got {found!r:.80}"
        )
    return dict(found)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; UserError where it is none, or cannot be read."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _read(path: Path) -> Corpus:
    found = read_yaml(path)
    if not isinstance(found, Mapping) or not found.get("sources"):
        raise UserError(f"{path} describes no corpus; wanted 'sources:' with a list of paths")
    defaults = {name: value for name, value in found.items() if name != "sources"}
    sources = found["sources"]
    if isinstance(sources, str | Mapping) or not isinstance(sources, Sequence):
        raise UserError(f"sources of {path} must be a list; got {sources!r:.80}")
    try:
        shared = _source({"path": ".", **defaults}, Path()).options()
        return Corpus(tuple(_source(one, path.parent) for one in sources)).with_defaults(**shared)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _source(what: Any, folder: Path) -> Source:
    """A source of a description; its path is relative to `folder`."""
    given = {"path": what} if isinstance(what, str) else what
    known = [one.name for one in fields(Source)]
    if not isinstance(given, Mapping) or "path" not in given:
        raise UserError(f"a source is a path, or has one with {', '.join(known[1:])}; got {what!r}")
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UserError(f"there is no {unknown[0]!r} of a source; there are {', '.join(known)}")
    path = given["path"]
    if isinstance(path, str) and not path.startswith(SCHEME):
        path = os.path.join(folder, path)
    languages = _languages(given.get("languages") or {}, "languages")
    own = {"path": path, "languages": languages}
    if isinstance(given.get("card"), str):
        own["card"] = os.path.join(folder, given["card"])
    return Source(**{**given, **own})
