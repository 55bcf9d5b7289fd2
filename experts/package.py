"""xelm.json: what a repository that xelm pushed contains, with the hash of every file.

It lies at the root of the repository. A later push deletes what it lists and is no longer there,
and leaves other files as they are; a pull reads what it lists and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self, get_args

from clustering.errors import UserError
from clustering.files import read_json
from experts.expert import Expert, check_types, hash_faults

FILE_NAME = "xelm.json"
FORMAT = 1
Kind = Literal["run", "expert"]

# Python unpickles the first ones, which can run any code; the others are code.
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".msgpack", ".h5")
_UNSAFE += (".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".exe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """What a repository contains; UserError for a file that is not to be read."""

    kind: Kind
    """Kind of the repository: a whole RUN, or one version of one expert."""
    xelm: str
    """Version of xelm that pushed it."""
    files: Mapping[str, str]
    """File, relative to the repository -> hexadecimal SHA-256; of all files but xelm.json."""
    seed: Mapping[str, str]
    """Files of the seed -> hexadecimal SHA-256: of which seed all experts are."""
    parent: Mapping[str, str] = field(default_factory=dict)
    """Files of the model that an expert started from -> hexadecimal SHA-256; empty for a RUN."""
    expert: Expert | None = None
    """Record of the expert in the registry that it comes from; None for a RUN."""

    def __post_init__(self):
        faults = [*hash_faults(dict(self.files)), *hash_faults(dict(self.seed))]
        unsafe = [name for name in self.files if is_unsafe(name)]
        faults += [f"{name} could run code and is not read" for name in unsafe]
        if self.kind not in get_args(Kind):
            faults.append(f"kind must be one of {', '.join(get_args(Kind))}; got {self.kind!r}")
        if FILE_NAME in self.files:
            faults.append("it lists itself")
        if faults:
            raise UserError(f"{FILE_NAME}: {'; '.join(faults[:5])}")

    def to_json(self) -> dict[str, Any]:
        """The content of xelm.json."""
        of_expert: dict[str, Any] = {}
        if self.expert is not None:
            parent = dict(sorted(self.parent.items()))
            of_expert = {"expert": self.expert.to_json(), "parent": parent}
        files, seed = dict(sorted(self.files.items())), dict(sorted(self.seed.items()))
        facts = {"format": FORMAT, "kind": self.kind, "xelm": self.xelm, **of_expert}
        return facts | {"seed": seed, "files": files}

    @classmethod
    def load(cls, path: Path) -> Self:
        """The package of an xelm.json; UserError if it is missing, damaged, or of a newer
        format."""
        value = read_json(path, newest_format=FORMAT)
        check_types(FILE_NAME, value, {"kind": str, "xelm": str, "files": dict, "seed": dict})
        for hashes in (value["files"], value["seed"]):
            check_types(FILE_NAME, hashes, dict.fromkeys(hashes, str))
        expert, parent = None, {}
        if value["kind"] == "expert":
            check_types(FILE_NAME, value, {"expert": dict, "parent": dict})
            parent = value["parent"]
            check_types(FILE_NAME, parent, dict.fromkeys(parent, str))
            expert = Expert.from_json(value["expert"], f"{FILE_NAME}: expert")
        kept = {key: value[key] for key in ("kind", "xelm", "files", "seed")}
        return cls(**kept, expert=expert, parent=parent)


def is_unsafe(name: str) -> bool:
    """Whether a file could run code when somebody loads it, as its name says."""
    return PurePosixPath(name).suffix.lower() in _UNSAFE
