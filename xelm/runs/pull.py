"""`xelm pull`: a whole RUN from the Hugging Face Hub.

Every file is compared with its hash before the RUN gets its name. No code is run, and nothing that
could run code is downloaded.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from clustering.errors import UserError
from clustering.files import flush, sha256
from experts import package
from experts.expert import SEED, Expert
from experts.lock import FOLDER as LOCKS
from experts.lock import locked, record
from experts.package import Package
from experts.registry import Registry
from experts.verify import verify
from xelm.data.corpus import AnyCorpus
from xelm.models.foreign import files_of, is_adapter
from xelm.runs.adopt import adopt
from xelm.runs.hub import MAIN, Commit, Repository
from xelm.runs.options import AdoptOptions
from xelm.runs.run import Run, open_run

# The library's notes of what is downloaded already, in the folder that it downloads to.
_NOTES = ".cache"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulled:
    """What was pulled from the Hub."""

    directory: Path
    """The RUN."""
    commit: str
    """Hash of the commit of the repository."""
    files: int
    """Number of files."""
    bytes: int
    """Size of all files."""
    experts: tuple[str, ...]
    """References of the experts, NAME@vN."""


def pull(name: str, directory: str | Path, revision: str | None = None) -> Pulled:
    """Downloads a whole RUN into a new directory, which appears once every file is there and as its
    recorded hash says. An interrupted download goes on where it ended.

    name: OWNER/REPO, to which `push` wrote a RUN. revision: branch, tag or commit; None: main.
    UserError for anything else than such a repository, and for a file that is not as it was
    pushed."""
    repository, directory = Repository(name=name, revision=revision or MAIN), Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists already; give a new or empty directory")
    with downloaded(repository, directory, "run") as (folder, commit, packed):
        run = open_run(folder)
        if faults := verify(folder):
            raise UserError(f"{repository} is damaged: {faults[0]}")
        experts = [expert.reference for expert in run.registry().published()]
        facts = {"from": str(repository), "commit": commit.sha}
        record(folder, "pull", experts, facts)
        _delete(folder / LOCKS)
        flush(folder)
        if directory.exists():
            directory.rmdir()
        folder.rename(directory)
    return Pulled(
        directory=directory,
        commit=commit.sha,
        files=len(packed.files),
        bytes=sum(commit.files[file].size for file in packed.files),
        experts=tuple(experts),
    )


def pull_into(
    run: Run, name: str, corpus: AnyCorpus | None = None, revision: str | None = None
) -> Expert:
    """Makes an expert of a RUN, or the next version of one, from a repository with one, if it
    passes the gate; no other expert changes.

    name: OWNER/REPO, to which `push` wrote an expert of a RUN with the same seed. corpus: text in
    its languages, as in `adopt`. An expert that is there already changes nothing. UserError as
    `pull` and `adopt` raise it, for an expert of another seed, and for an adapter of an expert that
    the RUN does not have."""
    repository = Repository(name=name, revision=revision or MAIN)
    registry = run.registry()
    place = run.directory / f"pulled-{repository.name.replace('/', '--')}"
    with downloaded(repository, place, "expert") as (folder, commit, packed):
        expert = packed.expert
        assert expert is not None
        if packed.seed != registry.seed_sha256:
            raise UserError(
                f"{repository} is an expert of another seed than that of {run.directory}; a model "
                "of the same shape and vocabulary can join it by: hf download, then xelm adopt"
            )
        weights = {file: packed.files[file] for file in files_of(folder)}
        if (known := _with_weights(registry, weights)) is not None:
            return known
        named = any(known.name == expert.name for known in registry.experts)
        parent = SEED if packed.parent == registry.seed_sha256 else None
        if parent is None and (found := _with_weights(registry, _weights(packed.parent))):
            parent = found.reference
        if parent is None and is_adapter(folder):
            raise UserError(
                f"{repository} is an adapter of {expert.parent}, whose weights {run.directory} "
                "does not have; pull that expert first, or the whole RUN that they are of"
            )
        options = AdoptOptions(name=expert.name, parent=parent)
        languages = () if named else expert.languages
        origin = {"from": str(repository), "commit": commit.sha}
        return adopt(run, folder, languages, corpus, options, origin=origin)


def _with_weights(registry: Registry, weights: Mapping[str, str]) -> Expert | None:
    """The expert that has files of weights with these hashes; None if there is none."""
    for known in registry.experts if weights else ():
        # One that joined the RUN from elsewhere may be stored as differences.
        of = (known.made or {}).get("sha256", known.sha256)
        if weights.items() <= of.items() and known.sha256 and known.removed is None:
            return known
    return None


def _weights(hashes: Mapping[str, str]) -> dict[str, str]:
    """The hashes of a model's files of weights; its card is another in each RUN."""
    return {file: digest for file, digest in hashes.items() if file.endswith(".safetensors")}


@contextmanager
def downloaded(
    repository: Repository, target: Path, kind: package.Kind
) -> Iterator[tuple[Path, Commit, Package]]:
    """Context with a folder beside `target` that has the files of a repository, each as its hash
    says, and nothing else; and what the repository says of them. An interrupted or refused download
    leaves the folder for the next call, which goes on with it.

    UserError if the repository is not of this kind, or if another process downloads to `target`."""
    commit = repository.commit()
    if commit is None:
        known = repository.exists()
        missing = "it has no such revision" if known else _NOT_THERE
        raise UserError(f"cannot read {repository}: {missing}")
    if package.FILE_NAME not in commit.files:
        raise UserError(
            f"{repository} has no {package.FILE_NAME}: xelm push did not write it; download a "
            "single checkpoint with hf download, and give it to xelm init --seed"
        )
    packed = read_package(repository, commit)
    if packed.kind != kind:
        found, where = _KINDS[packed.kind]
        raise UserError(
            f"{repository} is {found}; pull it with: xelm pull {repository.name} {where}"
        )
    missing = [file for file in packed.files if file not in commit.files]
    if missing:
        raise UserError(f"{repository} lacks {', '.join(missing[:5])}, which it lists")
    folder = target.with_name(f".{target.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    with locked(folder, "pull"):
        _fetch(repository, commit, packed.files, folder)
        yield folder, commit, packed
    # What was moved to its place is gone; of anything else, its locks are not.
    _delete(folder)


_NOT_THERE = (
    "there is no such repository, or it is private; log in with hf auth login, or set HF_TOKEN"
)
# What a repository of each kind is, and where it is pulled to.
_KINDS = {"run": ("a whole RUN", "DIR"), "expert": ("a single expert", "--into RUN")}


def read_package(repository: Repository, commit: Commit) -> Package:
    """What a repository says of its files; UserError for an xelm.json that is damaged, or that
    lists files that are not to be read."""
    with TemporaryDirectory() as folder:
        repository.download(commit.sha, [package.FILE_NAME], Path(folder))
        try:
            return Package.load(Path(folder) / package.FILE_NAME)
        except UserError as error:
            message = str(error).removeprefix(f"{folder}/")
            raise UserError(f"{repository}: {message}") from error


def _fetch(repository: Repository, commit: Commit, files: Mapping[str, str], folder: Path) -> None:
    _check_space(commit, files, folder)
    repository.download(commit.sha, files, folder)
    for file in [path for path in folder.rglob("*") if not path.is_dir()]:
        name = file.relative_to(folder).as_posix()
        # Of an earlier commit, whose download was interrupted.
        if name not in files and name.split("/")[0] not in (_NOTES, LOCKS):
            file.unlink()
            with suppress(OSError):  # others are in it
                file.parent.rmdir()
    for name, wanted in files.items():
        came = sha256(folder / name)
        if came != wanted:
            (folder / name).unlink()
            raise UserError(
                f"{repository}: {name} is not as it was pushed: wanted sha256 {wanted}; got {came}"
            )
    _delete(folder / _NOTES)


def _check_space(commit: Commit, files: Mapping[str, str], folder: Path) -> None:
    there = {name: folder / name for name in files if (folder / name).is_file()}
    need = sum(commit.files[name].size for name in files if name not in there)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{need / 1e6:,.1f} MB are to be downloaded to {folder}, and {free / 1e6:,.1f} MB are "
            "free there"
        )


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
