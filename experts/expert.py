"""The record of one version of one expert: its name, its parent, its languages, its hashes."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from clustering.errors import UserError

SEED = "seed"

Status = Literal["training", "published", "retired"]

# Names of other systems in results.json, which no expert may have.
RESERVED_NAMES = (SEED, "dense", "ensemble")

STORED = ("adapter", "difference")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_REFERENCE = re.compile(rf"({_NAME.pattern})@v([1-9][0-9]*)")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Keys of a record in registry.json: required ones, and those that may be absent or null.
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
    "evaluation": dict,
    "published_as": str,
    "corpora": list,
    "donor": str,
    "data": dict,
    "made": dict,
    "removed": str,
    "vocabulary": dict,
    "stored": str,
    "joined": list,
    "round_clusters": int,
    "awaits": str,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Expert:
    """One version of one expert; UserError for an impossible field."""

    name: str
    """Safe folder name; together with `version` it is unique in the RUN."""
    version: int = 1
    """Number of the version, from 1."""
    parent: str = SEED
    """Model whose weights it started from: 'seed', or 'NAME@vN'."""
    round: int = 1
    """Round: 1 if it started from the seed, else one more than its parent's; a new version of the
    same expert stays in its round."""
    languages: tuple[str, ...] = ()
    """BCP 47 tags of the languages it serves. In clusters of documents, a language is served by the
    expert with most of its documents, so that an expert may serve none."""
    cluster: str | None = None
    """Name of the cluster it was branched for; None for a grown expert."""
    documents: dict[str, int] | None = None
    """Language -> number of documents in its cluster; None for clusters of languages."""
    path: str = ""
    """Directory relative to the RUN; empty for experts/NAME/vN."""
    sha256: dict[str, str] = field(default_factory=dict)
    """File, relative to `path` -> hexadecimal SHA-256; empty until it is published."""
    tokens: int = 0
    """Number of tokens that this version was trained on, without its parent's."""
    status: Status = "training"
    """Status: 'training' is unfinished; 'retired' is superseded, rolled back or given up."""
    replaces: int | None = None
    """Version of the same name that it replaced when it was published; None if there was none."""
    reason: str | None = None
    """Why a grown expert has its parent; None for a branched expert, or if not given."""
    settings: dict[str, int | float | str | None] | None = None
    """Settings of a grown expert's training that differ from the RUN's: name, such as `grow.tokens`
    -> value."""
    evaluation: dict[str, dict[str, dict[str, float]]] | None = None
    """Bits a byte on held-out text when it was published: "own" languages or "others" -> language
    -> "expert", "parent", "seed", "present" (the version that it replaces, if that is not its
    parent), and "documents", their number; None if it was not measured."""
    published_as: str | None = None
    """Reference under which it was published, if it was renamed since then; its directory keeps
    that name."""
    corpora: tuple[str, ...] | None = None
    """Names of the tokenised corpora under RUN/corpus, beside that of the RUN, whose text in its
    languages it was trained on; None in records of experts of clusters with the RUN's text alone,
    and of experts that were grown before this was recorded."""
    donor: str | None = None
    """Expert 'NAME@vN' whose languages are a part of the rows of a grown expert's further version,
    or 'seed' for none; None: the parent."""
    data: dict[str, list[dict[str, Any]]] | None = None
    """Language -> one entry for each corpus with the text that it was trained on: its counts, its
    hash and its data cards; None if it was not recorded."""
    made: dict[str, Any] | None = None
    """How its weights were made, if this version was not trained here: "by", such as "adopt",
    "from", the directory or version, and what else belongs to it; None if it was trained."""
    vocabulary: dict[str, Any] | None = None
    """How its vocabulary was extended: "pieces", their number; "initialise", the method that made
    their rows; "text", the corpus under RUN/corpus whose folder has the tokenizer; and
    "tokens_per_character" of that text, by the seed's tokenizer and by its own. None: it has the
    seed's."""
    stored: str | None = None
    """What its directory has: "adapter", or "difference", to be composed with its parent's; None: a
    complete checkpoint."""
    joined: tuple[str, ...] | None = None
    """Those of its languages that joined the expert with this version; None if none did."""
    round_clusters: int | None = None
    """Number of clusters of the round of training that it belongs to, for an intermediate expert,
    from which those of the next round start; it is never in use itself. None for all others."""
    awaits: str | None = None
    """Name of the intermediate expert that it is to start from, until that is trained; None:
    `parent`."""
    removed: str | None = None
    """Time in UTC when it was removed with its files; its record stays, with little else, only as
    long as other experts descend from it. None: it was not removed."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further keys of its record in registry.json, kept as they are."""

    def __post_init__(self):
        check_name(self.name)
        if not self.path:
            object.__setattr__(self, "path", f"experts/{self.name}/v{self.version}")
        faults = list(self._faults())
        if faults:
            raise UserError(f"expert {self.reference}: {'; '.join(faults[:5])}")

    def _faults(self) -> Iterator[str]:
        if self.version < 1 or self.round < 1 or self.tokens < 0:
            yield f"version {self.version}, round {self.round}, {self.tokens} tokens are impossible"
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
        if self.joined is not None and not set(self.joined) < set(self.languages):
            yield f"{', '.join(self.joined)} joined, and it serves {', '.join(self.languages)}"
        if self.round_clusters is not None and self.status == "published":
            yield "it is intermediate, and published"
        if self.corpora and any(not stays_inside(n) or "/" in n for n in self.corpora):
            yield f"corpora must be names of folders; got {', '.join(map(repr, self.corpora))}"
        if self.stored not in (None, *STORED):
            yield f"stored must be null, {' or '.join(STORED)}; got {self.stored!r}"
        if self.donor not in (None, SEED) and not _REFERENCE.fullmatch(self.donor or ""):
            yield f"donor must be 'seed' or NAME@v1; got {self.donor!r}"
        if not stays_inside(self.path):
            yield f"path must lie inside the RUN; got {self.path!r}"
        if self.status not in get_args(Status):
            yield f"status must be one of {', '.join(get_args(Status))}; got {self.status!r}"
        if self.published_as is not None and not _REFERENCE.fullmatch(self.published_as):
            yield f"it was published as NAME@v1; got {self.published_as!r}"
        if self.removed is not None and self.status != "retired":
            yield f"it was removed and is {self.status}"
        if self.status == "published" and not self.sha256:
            yield "it is published without hashes"
        yield from hash_faults(self.sha256)

    @property
    def reference(self) -> str:
        """Name and version, 'NAME@vN', as in `parent` of its children."""
        return f"{self.name}@v{self.version}"

    @property
    def intermediate(self) -> bool:
        """Whether it is only the parent of experts of a later round."""
        return self.round_clusters is not None

    @property
    def state(self) -> str:
        """Status to be shown: "parent" for an intermediate expert that is trained, "removed" for
        what stays of a version that was removed."""
        if self.removed is not None:
            return "removed"
        return "parent" if self.intermediate and self.sha256 else self.status

    @property
    def first_reference(self) -> str:
        """Reference that stays the same when it is renamed."""
        return self.published_as or self.reference

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the tokenised corpora under RUN/corpus that have text in its languages; a grown
        expert's first was named after its language before names were recorded."""
        if self.cluster is not None:
            return ("train", *(self.corpora or ()))
        return self.languages if self.corpora is None else self.corpora

    def stub(self, when: str) -> "Expert":
        """The record of this version after it was removed: what its descendants need, and nothing
        of its text, its settings and its evaluation. when: time in UTC."""
        kept = ("name", "version", "parent", "round", "languages", "cluster", "path", "sha256")
        more = ("tokens", "published_as", "replaces", "round_clusters")
        facts = {key: getattr(self, key) for key in (*kept, *more)}
        if not self.languages:
            facts["documents"] = dict.fromkeys(self.documents or (), 0)
        return Expert(**facts, status="retired", removed=when)

    @property
    def why_unused(self) -> str:
        """Why it cannot be used, and how it can be."""
        if self.removed is not None:
            return f"{self.reference} was removed on {self.removed[:10]}"
        if self.intermediate:
            return (
                f"{self.reference} is the intermediate expert of a round of training; it is only "
                "the parent of others, and never in use"
            )
        if self.status == "retired" and self.sha256:
            return f"{self.reference} is retired; bring it back with: xelm restore RUN {self.name}"
        return f"{self.reference} is {self.status}, not published"

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The expert with its own name and those of its parent and its donor replaced where they
        are in `names`."""

        def now(reference: str) -> str:
            of, version = parse_reference(reference)
            return f"{names.get(of, of)}@v{version}"

        first, name = self.first_reference, names.get(self.name, self.name)
        new = replace(
            self,
            name=name,
            parent=SEED if self.parent == SEED else now(self.parent),
            donor=self.donor if self.donor in (None, SEED) else now(self.donor),
        )
        return replace(new, published_as=None if first == new.reference else first)

    def directory(self, run: Path | str) -> Path:
        """Directory of its checkpoint, which may not be there yet."""
        return Path(run) / self.path

    def to_json(self) -> dict[str, Any]:
        """Its record in registry.json."""
        value = {key: getattr(self, key) for key in _JSON_TYPES | _OPTIONAL_JSON_TYPES}
        for key in ("languages", "corpora", "joined"):
            value[key] = None if value[key] is None else list(value[key])
        # Keys that few records have are absent elsewhere, as in registries before them.
        seldom = ("joined", "round_clusters", "awaits", "removed")
        rare = [key for key in seldom if value[key] is None]
        return {key: value[key] for key in value if key not in rare} | self.more

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """The expert of a record; UserError for a broken one, which `where` names."""
        check_types(where, value, _JSON_TYPES)
        for texts in (value["sha256"], dict(enumerate(value["languages"]))):
            check_types(where, texts, dict.fromkeys(texts, str))
        optional = {key: value[key] for key in _OPTIONAL_JSON_TYPES if value.get(key) is not None}
        check_types(where, optional, {key: _OPTIONAL_JSON_TYPES[key] for key in optional})
        documents, settings = optional.get("documents", {}), optional.get("settings", {})
        check_types(f"{where}: documents", documents, dict.fromkeys(documents, int))
        given = {name: setting for name, setting in settings.items() if setting is not None}
        check_types(f"{where}: settings", given, dict.fromkeys(given, int | float | str))
        for key in optional.keys() & {"corpora", "joined"}:
            names = dict(enumerate(optional[key]))
            check_types(f"{where}: {key}", names, dict.fromkeys(names, str))
            optional[key] = tuple(optional[key])
        data = optional.get("data", {})
        check_types(f"{where}: data", data, dict.fromkeys(data, list))
        ours = {key: value[key] for key in _JSON_TYPES} | {"languages": tuple(value["languages"])}
        more = {key: value[key] for key in value if key not in _JSON_TYPES | _OPTIONAL_JSON_TYPES}
        return cls(**ours, **optional, more=more)


def check_name(name: str) -> None:
    """Raises UserError unless `name` is a safe folder name and not that of another system."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name an expert: use up to 100 letters a-z or A-Z, digits, "
            "'-', '_' and '.', with no '-' or '.' in front"
        )
    if name.lower() in RESERVED_NAMES:
        raise UserError(f"{name!r} cannot name an expert: it names another system of a RUN")


def is_name(name: str) -> bool:
    """Whether `name` is a safe folder name."""
    return _NAME.fullmatch(name) is not None


def is_reference(name: str) -> bool:
    """Whether `name` looks like a version of an expert, 'NAME@v1'."""
    return _REFERENCE.fullmatch(name) is not None


def parse_reference(reference: str) -> tuple[str, int]:
    """Name and version from 'NAME@vN'; UserError for anything else."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UserError(f"{reference!r} names no version of an expert; it should look like NAME@v1")
    return match[1], int(match[2])


def stays_inside(path: str) -> bool:
    """Whether `path` is a plain relative path ('a/b') that cannot leave its base directory."""
    return not set(path) & set("\\:\0") and not set(path.split("/")) & {"", ".", ".."}


def hash_faults(sha256: dict[str, str]) -> Iterator[str]:
    """Faults of a table of files and their hashes, one line each."""
    for file, digest in sha256.items():
        if not stays_inside(file):
            yield f"the file {file!r} leaves its directory"
        if not _SHA256.fullmatch(digest):
            yield f"{file!r} has the sha256 {digest!r}"


def check_types(where: str, value: Any, types: Mapping[Any, Any]) -> None:
    """Raises UserError unless `value`, read at `where`, is an object with these keys and types."""
    if not isinstance(value, dict):
        raise UserError(f"{where} should be an object; got {value!r}")
    for key, kind in types.items():
        if key not in value:
            raise UserError(f"{where} lacks {key!r}")
        # bool is an int in Python, but true is no number in JSON.
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            wanted = getattr(kind, "__name__", kind)
            raise UserError(f"{where}: {key!r} should be {wanted}; got {value[key]!r}")
