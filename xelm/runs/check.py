"""Checks that the models that a command is about to use are as published and have finite weights;
made before any work, by every command that opens models.

A file is read once for this and remembered by size and time of change in RUN/.locks/checked.json,
so that later commands do not read it again; `xelm verify` reads all files and remembers nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from clustering.errors import UserError
from clustering.files import read_json, sha256, write_json
from experts.expert import SEED, Expert, parse_reference
from experts.manifest import MIXES
from experts.verify import verify_base, verify_expert, verify_recorded, verify_seed
from xelm.models.checkpoint import check_checkpoint, read_config
from xelm.models.weights import tensor_without_numbers
from xelm.progress import bar
from xelm.runs.run import Run

# Beside the locks, which are no data either.
REMEMBERED = Path(".locks") / "checked.json"
# Read without a bar.
_QUIET_BYTES = 10**9


def check_models(
    run: Run,
    experts: Iterable[Expert],
    others: Mapping[str, Path] | None = None,
    *,
    report: Callable[[str], object] = lambda model: None,
) -> None:
    """Raises UserError, which names the model and its file or tensor, unless all of these have
    finite weights and the files whose hashes are in the registry. others: the seed, the dense
    baseline or merged models, by name. report: called with which model is being read, such as
    "expert 3 of 8" or "seed"."""
    memory, others = _Memory(run.directory), dict(others or {})
    experts, based = _with_bases(run, experts)
    if based:
        others.setdefault(SEED, run.seed)
    folders = {expert.reference: expert.directory(run.directory) for expert in experts} | others
    count = len(folders) - len(others)
    labels = [f"expert {number + 1} of {count}" for number in range(count)] + list(others)
    files = {
        file: label
        for label, folder in zip(labels, folders.values())
        for file in sorted(folder.rglob("*"))
    }
    memory.read(files, lambda file: report(files[file]))
    by_reference = {expert.reference: expert for expert in experts}
    shape = read_config(run.seed)

    def digest(file: Path) -> str:
        return memory[file]["sha256"]

    for name, folder in folders.items():
        for file in sorted(folder.glob("*.safetensors")):
            if (tensor := memory[file]["without_numbers"]) is not None:
                raise UserError(
                    f"{name}: {tensor} in {file} has NaN or infinite values; put back the "
                    "file as it was published"
                )
        if name in by_reference:
            faults = verify_expert(run.directory, by_reference[name], digest)
            faults += verify_base(run.directory, run.registry(), by_reference[name])
        elif name == SEED:
            # A file of somebody's own beside the seed, such as a chat template, changes no weight.
            found = verify_seed(run.directory, run.registry(), digest)
            faults = [fault for fault in found if fault.kind != "unknown"]
        else:
            faults = verify_recorded(run.directory, memory.name_of(folder), digest)
        if faults:
            raise UserError(f"{name}: {faults[0]}")
        found = check_checkpoint(folder)
        if name in by_reference and by_reference[name].vocabulary is not None:
            found = replace(found, vocabulary_size=shape.vocabulary_size)
        if is_mixture(name):  # of the same experts, in a shape of its own
            found = replace(found, expert_count=0, experts_per_token=0)
        if found != shape:
            raise UserError(f"{name}: {folder} is a model of another shape than the seed's")
    memory.save()


def _with_bases(run: Run, experts: Iterable[Expert]) -> tuple[list[Expert], bool]:
    """Experts and those whose checkpoints they are composed with, and whether the seed is one of
    these."""
    found, registry, seed = list(experts), run.registry(), False
    for expert in found:  # which grows
        if expert.stored and expert.parent == SEED:
            seed = True
        elif expert.stored:
            parent = registry.expert(*parse_reference(expert.parent))
            found += [] if parent in found else [parent]
    return found, seed


def is_mixture(name: str) -> bool:
    """Whether a model of `Run.combined` is a mixture of experts, whose shape is its own."""
    return name.startswith(f"{MIXES}/")


class _Memory:
    """Cache of facts about files, valid while they have the same size and time of change."""

    def __init__(self, directory: Path):
        self._directory, self._path = directory, directory / REMEMBERED
        self._files: dict[str, dict[str, Any]] = {}
        with suppress(UserError, KeyError):  # it is made anew
            self._files = dict(read_json(self._path)["files"]) if self._path.exists() else {}
        self._before = dict(self._files)

    def read(self, files: Iterable[Path], report: Callable[[Path], object]) -> None:
        """Reads the files that are not in the cache, several at a time. report: called with the
        first file that is not read yet."""
        new = [file for file in files if file.is_file() and not self._known(file)]
        size = sum(file.stat().st_size for file in new)
        with (
            bar(size, "check", "B", shown=size > _QUIET_BYTES) as progress,
            ThreadPoolExecutor() as pool,
        ):
            entries = pool.map(_looked_at, new)
            for file in new:
                report(file)
                entry = next(entries)
                self._files[self.name_of(file)] = entry
                progress.update(entry["size"])

    def __getitem__(self, file: Path) -> dict[str, Any]:
        """Facts about a file that was read: its `sha256`, and in `without_numbers` the name of a
        tensor with NaN or infinity, or None."""
        return self._files[self.name_of(file)]

    def save(self) -> None:
        """Writes the cache for later commands, if the RUN is writable."""
        if self._files != self._before:
            there = {n: e for n, e in self._files.items() if (self._directory / n).is_file()}
            with suppress(UserError, OSError):
                write_json(self._path, {"format": 1, "files": there})

    def name_of(self, file: Path) -> str:
        """Path of a file or folder relative to the RUN."""
        return file.relative_to(self._directory).as_posix()

    def _known(self, file: Path) -> bool:
        return _stamp(file).items() <= self._files.get(self.name_of(file), {}).items()


def _stamp(file: Path) -> dict[str, int]:
    found = file.stat()
    return {"size": found.st_size, "changed_ns": found.st_mtime_ns}


def _looked_at(file: Path) -> dict[str, Any]:
    stamp, weights = _stamp(file), file.suffix == ".safetensors"
    tensor = tensor_without_numbers(file) if weights else None
    return {**stamp, "sha256": sha256(file), "without_numbers": tensor}
