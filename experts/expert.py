"""One version of one expert, as a record: its name, where it came from, what its files hash to."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from clustering.errors import UserError

SEED = "seed"

Status = Literal["training", "published", "retired"]

# Names of other systems in results.json, so no expert may bear them.
RESERVED_NAMES = (SEED, "dense", "ensemble")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_REFERENCE = re.compile(rf"({_NAME.pattern})@v([1-9][0-9]*)")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Keys of a record in registry.json: always there, and those that may be absent or null.
_JSON_TYPES = {
    "name": str,
    "version": int,
    "parent": str,
    "round": int,
    "languages": list,
    "path": str,
    "sha256": dict,
    "tokens": int,
    "status": str,
}
_OPTIONAL_JSON_TYPES = {
    "cluster": str,
    "documents": dict,
    "replaces": int,
    "reason": str,
    "settings": dict,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Expert:
    """One version of one expert. UserError if a field cannot be."""

    name: str
    """A safe folder name, unique in the RUN together with `version`."""
    version: int = 1
    """Counts from 1."""
    parent: str = SEED
    """Whose weights it started from: 'seed', or 'NAME@vN'."""
    round: int = 1
    """1 if it started from the seed, else one more than its parent's; a new version of itself stays
    in its round."""
    languages: tuple[str, ...] = ()
    """BCP 47 tags of the languages it serves. Of clusters of documents, each serves the languages
    that it has most documents of, which may be none."""
    cluster: str | None = None
    """Name of the cluster it was branched for; None if it was grown."""
    documents: dict[str, int] | None = None
    """Language -> documents in its cluster, for a cluster of documents; else None."""
    path: str = ""
    """Its directory relative to the RUN; empty stands for experts/NAME/vN."""
    sha256: dict[str, str] = field(default_factory=dict)
    """File, relative to `path`, to hexadecimal SHA-256. Empty until it is published."""
    tokens: int = 0
    """Tokens that this version was trained on, its parent's not counted."""
    status: Status = "training"
    """'training' is unfinished; 'retired' is superseded, rolled back or given up."""
    replaces: int | None = None
    """The version of the same name in use when it was published; None before, or if none was."""
    reason: str | None = None
    """Why a grown expert has its parent; None if it was branched, or nobody said."""
    settings: dict[str, int | float | None] | None = None
    """Settings with which the training of a grown expert began, where they are others than the
    RUN's: name, such as `grow.tokens`, to value."""
    more: dict[str, Any] = field(default_factory=dict)
    """Keys beside ours in registry.json, kept as they came."""

    def __post_init__(self):
        check_name(self.name)
        if not self.path:
            object.__setattr__(self, "path", f"experts/{self.name}/v{self.version}")
        faults = list(self._faults())
        if faults:
            raise UserError(f"expert {self.reference}: {'; '.join(faults[:5])}")

    def _faults(self) -> Iterator[str]:
        if self.version < 1 or self.round < 1 or self.tokens < 0:
            yield f"version {self.version}, round {self.round} and {self.tokens} tokens cannot be"
        if self.replaces is not None and not 0 < self.replaces < self.version:
            yield f"it cannot replace version {self.replaces}"
        if self.parent != SEED and not _REFERENCE.fullmatch(self.parent):
            yield f"parent must be 'seed' or NAME@v1; got {self.parent!r}"
        if not self.languages and not self.documents:
            yield "it has neither languages nor documents"
        if any(not tag or tag != "".join(tag.split()) for tag in self.languages):
            yield f"a language is empty or has spaces: {', '.join(map(repr, self.languages))}"
        if len(set(self.languages)) < len(self.languages):
            yield f"a language is named twice: {', '.join(self.languages)}"
        if not stays_inside(self.path):
            yield f"path must lie inside the RUN; got {self.path!r}"
        if self.status not in get_args(Status):
            yield f"status must be one of {', '.join(get_args(Status))}; got {self.status!r}"
        if self.status == "published" and not self.sha256:
            yield "it is published without hashes"
        yield from hash_faults(self.sha256)

    @property
    def reference(self) -> str:
        """'NAME@vN', as `parent` of its children has it."""
        return f"{self.name}@v{self.version}"

    def directory(self, run: Path | str) -> Path:
        """Where its checkpoint lies or will lie."""
        return Path(run) / self.path

    def to_json(self) -> dict[str, Any]:
        """Its record in registry.json."""
        value = {key: getattr(self, key) for key in _JSON_TYPES | _OPTIONAL_JSON_TYPES}
        return value | {"languages": list(self.languages)} | self.more

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """The expert of a record; `where` names it in the UserError that a broken record raises."""
        check_types(where, value, _JSON_TYPES)
        check_strings(where, value["sha256"])
        check_strings(where, dict(enumerate(value["languages"])))
        optional = {key: value[key] for key in _OPTIONAL_JSON_TYPES if value.get(key) is not None}
        check_types(where, optional, {key: _OPTIONAL_JSON_TYPES[key] for key in optional})
        documents = optional.get("documents", {})
        check_types(f"{where}: documents", documents, dict.fromkeys(documents, int))
        for name, number in optional.get("settings", {}).items():
            if not isinstance(number, int | float | None) or isinstance(number, bool):
                raise UserError(
                    f"{where}: settings: {name!r} should be a number or null; got {number!r}"
                )
        ours = {key: value[key] for key in _JSON_TYPES} | {"languages": tuple(value["languages"])}
        more = {key: value[key] for key in value if key not in _JSON_TYPES | _OPTIONAL_JSON_TYPES}
        return cls(**ours, **optional, more=more)


def check_name(name: str) -> None:
    """Raise UserError unless `name` is a safe folder name that no other system of a RUN bears."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name an expert: use up to 100 letters a-z or A-Z, digits, "
            "'-', '_' and '.', with no '-' or '.' in front"
        )
    if name.lower() in RESERVED_NAMES:
        raise UserError(f"{name!r} cannot name an expert: it means another system of a RUN")


def parse_reference(reference: str) -> tuple[str, int]:
    """The name and version that 'NAME@vN' stands for."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UserError(f"{reference!r} names no version of an expert; it should look like NAME@v1")
    return match[1], int(match[2])


def stays_inside(path: str) -> bool:
    """Whether `path` is a plain relative path ('a/b') that cannot leave its base."""
    return not set(path) & set("\\:\0") and not set(path.split("/")) & {"", ".", ".."}


def hash_faults(sha256: dict[str, str]) -> Iterator[str]:
    """What is wrong with a table of files and their hashes."""
    for file, digest in sha256.items():
        if not stays_inside(file):
            yield f"the file {file!r} leaves its directory"
        if not _SHA256.fullmatch(digest):
            yield f"{file!r} has the sha256 {digest!r}"


def check_types(where: str, value: Any, types: dict[str, type]) -> None:
    """Raise UserError unless `value`, read at `where`, is an object with these keys and types."""
    if not isinstance(value, dict):
        raise UserError(f"{where} should be an object; got {value!r}")
    for key, kind in types.items():
        if key not in value:
            raise UserError(f"{where} lacks {key!r}")
        # bool is an int in Python, but true is no number in JSON.
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            raise UserError(f"{where}: {key!r} should be {kind.__name__}; got {value[key]!r}")


def check_strings(where: str, value: dict[Any, Any]) -> None:
    """Raise UserError unless every value of `value`, read at `where`, is a string."""
    for key, text in value.items():
        if not isinstance(text, str):
            raise UserError(f"{where}: {key!r} should be str; got {text!r}")
