"""`xelm push`: an expert, or the whole RUN, as a repository of the Hugging Face Hub.

Each push is one commit, so that nobody downloads a part of one, and its files are compared with
those here afterwards. The tokenised text, unfinished trainings, logs and locks stay here.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from clustering.errors import UserError
from clustering.files import read_object, sha256
from clustering.hub_files import LICENCES
from experts import manifest, package
from experts.card import shared_card
from experts.expert import SEED, parse_reference
from experts.lock import record
from experts.merge import RECORD
from experts.package import Package
from experts.places import registry_to_share, to_share, without_folders
from experts.registry import FILE_NAME as REGISTRY
from experts.registry import Registry
from experts.run_card import run_card
from experts.verify import hash_directory, verify
from xelm.models.checkpoint import README, read_config, write_whole
from xelm.models.foreign import is_adapter
from xelm.models.stored import base_of, chain
from xelm.runs.fitted import fit_routers
from xelm.runs.hub import Commit, Repository, require_token
from xelm.runs.named import find_model
from xelm.runs.options import PushOptions
from xelm.runs.origin import origin_facts
from xelm.runs.pull import read_package
from xelm.runs.run import Run
from xelm.runs.shared import shared_parent
from xelm.version import __version__

_WITH_PLACES = ("run.json", "clusters.json", RECORD)
"""Names of files that may say where something lies on this machine, beside tables of results."""
Files = Mapping[str, Path | bytes]
"""File, relative to the repository -> the file here, or its content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pushed:
    """What a push did, or would do."""

    repository: str
    """OWNER/REPO, with its branch unless that is main."""
    url: str
    """Page of the repository."""
    files: dict[str, int]
    """File, relative to the repository -> its size in bytes."""
    uploaded: tuple[str, ...] | None = None
    """Files that were not there or were different; None in a plan."""
    deleted: tuple[str, ...] | None = None
    """Files of an earlier push that are gone; None in a plan."""
    commit: str | None = None
    """Hash of the commit that has them; None in a plan."""


def push(run: Run, to: str, name: str | None = None, options: PushOptions | None = None) -> Pushed:
    """Writes an expert, or the whole RUN, into a repository of the Hub, which is made if it is not
    there.

    to: OWNER/REPO. name: an expert, or NAME@vN for a certain version of it; None: the whole RUN.
    Files that are there already are not uploaded again, and those of an earlier push that are gone
    here are deleted in the same commit; other files stay. UserError if the files here are not as
    they were published, if the repository has something else, and where the Hub refuses."""
    options = options or PushOptions()
    repository = Repository(name=to, revision=options.revision)
    require_token()
    if name is None:
        fit_routers(run)
    with TemporaryDirectory() as scratch:
        files, packed = _files(run, to, name, Path(scratch))
        return _write(run, repository, options, files, packed)


def plan_push(
    run: Run, to: str, name: str | None = None, options: PushOptions | None = None
) -> Pushed:
    """What `push` would write with these arguments, but for routers that are to be fitted; reaches
    no host, and changes nothing."""
    repository = Repository(name=to, revision=(options or PushOptions()).revision)
    with TemporaryDirectory() as scratch:
        return _pushed(repository, _files(run, to, name, Path(scratch))[0])


def _write(
    run: Run, repository: Repository, options: PushOptions, files: Files, packed: Package
) -> Pushed:
    before = repository.commit()
    if before is None:
        repository.create(private=options.private)
        before = repository.commit()
        if before is None:
            raise UserError(f"{repository} was made and cannot be read; check the token's rights")
    if options.private and not before.private:
        raise UserError(
            f"{repository.name} is there and public; make it private on {repository.url}/settings, "
            "or push without --private"
        )
    theirs = _compatible(repository, before, packed)
    new = {f: files[f] for f in sorted(files) if _differs(before, f, files[f], packed)}
    gone = sorted((set(theirs) & set(before.files)) - set(files))
    commit = before.sha
    if new or gone:
        what = "whole RUN" if packed.expert is None else packed.expert.reference
        message = f"{what}, by xelm {__version__}"
        commit = repository.write(new, gone, message=message, parent=before.sha)
        _check_arrived(repository, files, packed)
    facts = {"to": str(repository), "commit": commit, "kind": packed.kind}
    registry = run.registry()
    # A push that ended before this is recorded by the next one, which finds it all done.
    if not any(event.action == "push" and facts == event.facts for event in registry.history):
        experts = packed.expert and [packed.expert.reference]
        published = [expert.reference for expert in registry.published()]
        try:
            record(run.directory, "push", experts or published, facts)
        except (UserError, OSError) as error:
            why = getattr(error, "strerror", None) or str(error)
            why = why.removesuffix("; nothing was changed")  # true of the RUN alone
            raise UserError(
                f"{repository} has the files now, in the commit {commit}, and {run.directory} has "
                f"no record of that ({why}); push again, which records it"
            ) from error
    planned = _pushed(repository, files)
    return replace(planned, uploaded=tuple(new), deleted=tuple(gone), commit=commit)


def _pushed(repository: Repository, files: Files) -> Pushed:
    sizes = {name: _size(files[name]) for name in sorted(files)}
    return Pushed(repository=str(repository), url=repository.url, files=sizes)


def _files(run: Run, to: str, name: str | None, scratch: Path) -> tuple[Files, Package]:
    """The files of a repository, and what its xelm.json says of them. scratch: an empty folder for
    files that are made now."""
    return _of_run(run, to) if name is None else _of_expert(run, to, name, scratch)


def _of_expert(run: Run, to: str, name: str, scratch: Path) -> tuple[Files, Package]:
    """The files of an expert's repository: its checkpoint or adapter, and xelm.json."""
    directory, expert = find_model(run, name)
    if expert is None:
        raise UserError(f"experts and whole RUNs are pushed; got {name}, which xelm export copies")
    hashes, registry = dict(expert.sha256), run.registry()
    if base_of(directory) is not None and not is_adapter(directory):
        # What differs from another checkpoint is of no use without that.
        write_whole(directory, scratch / "whole")
        shutil.copyfile(directory / README, scratch / "whole" / README)
        directory = scratch / "whole"
        hashes = hash_directory(directory)
    parent = registry.seed_sha256
    if expert.parent != SEED:
        parent = registry.expert(*parse_reference(expert.parent)).sha256
    files: dict[str, Path | bytes] = {file: directory / file for file in hashes}
    if expert.stored is not None:
        page = shared_card(
            (directory / README).read_text(encoding="utf-8"),
            expert,
            registry,
            repository=to,
            sha256=hashes,
            parent=shared_parent(run, expert),
            masked=not read_config(run.seed).causal,
        )
        files[README] = page.encode()
        hashes[README] = _sha256(files[README])
    packed = Package(
        kind="expert",
        xelm=__version__,
        files=hashes,
        seed=registry.seed_sha256,
        parent=parent,
        expert=to_share(expert),
    )
    return files | {package.FILE_NAME: _bytes(packed.to_json())}, packed


def _of_run(run: Run, to: str) -> tuple[Files, Package]:
    """The files of a whole RUN's repository: what `verify` compares, but for the versions of
    experts that are neither in use nor the base of one that is; the tables of evaluations; a card;
    and xelm.json."""
    if faults := verify(run.directory):
        raise UserError(f"{run.directory} is damaged: {faults[0]}")
    # In this order: a version is recorded in the manifest before it is in the registry.
    registry = registry_to_share(run.registry())
    recorded = manifest.recorded(run.directory)
    hashes = {
        file: digest
        for file, digest in recorded.items()
        if not manifest.is_given_up(run.directory, file)
    }
    folders = {registry.seed_path: registry.seed_sha256}
    # The weights of some are stored as differences from others, which may be out of use.
    places = {expert.directory(run.directory).absolute(): expert for expert in registry.experts}
    for expert in registry.published():
        for directory in chain(expert.directory(run.directory)):
            if (found := places.get(directory.absolute())) is not None:
                folders[found.path] = found.sha256
    for folder, inside in folders.items():
        hashes |= {f"{folder}/{file}": digest for file, digest in inside.items()}
    files: dict[str, Path | bytes] = {file: run.directory / file for file in hashes}
    tables = sorted(run.results.glob("results*.json"))
    files |= {file.relative_to(run.directory).as_posix(): file for file in tables}
    for file in files:
        if Path(file).name in _WITH_PLACES or run.directory / file in tables:
            value = read_object(run.directory / file)
            if (shared := without_folders(value)) != value:
                files[file] = _bytes(shared)
                hashes[file] = _sha256(files[file])
    files[REGISTRY] = _bytes(registry.to_json())
    files[manifest.FILE_NAME] = _bytes(manifest.to_share(run.directory, hashes, registry))
    files[README] = _card(run, registry, to).encode()
    for file in files.keys() - hashes.keys():
        hashes[file] = _sha256(files[file])
    packed = Package(kind="run", xelm=__version__, files=hashes, seed=registry.seed_sha256)
    return files | {package.FILE_NAME: _bytes(packed.to_json())}, packed


def _card(run: Run, registry: Registry, to: str) -> str:
    models = [run.dense.name] if run.dense.exists() else []
    masked = not read_config(run.seed).causal
    return run_card(to, registry, origin_facts(run), [*models, *run.combined()], masked=masked)


def _compatible(repository: Repository, before: Commit, packed: Package) -> list[str]:
    """Files of the repository that earlier pushes wrote; UserError if it has something else than
    this RUN or this expert."""
    if package.FILE_NAME not in before.files:
        ours = {README, ".gitattributes"}
        others = [
            name
            for name in before.files
            if name not in ours and not name.lower().startswith(LICENCES)
        ]
        if others:
            raise UserError(
                f"{repository} has files that xelm did not push: {', '.join(others[:5])}; give a "
                "new repository"
            )
        return []
    theirs = read_package(repository, before)
    if packed.expert is None or theirs.expert is None:
        same = packed.kind == theirs.kind and packed.seed == theirs.seed
    else:
        mine, other = packed.expert, theirs.expert
        same = mine.name == other.name or set(mine.languages) == set(other.languages)
    if not same:
        has = "a RUN of another seed" if theirs.kind == packed.kind else "a whole RUN"
        if theirs.expert is not None:
            has = f"the expert {theirs.expert.reference} ({' '.join(theirs.expert.languages)})"
        raise UserError(f"{repository} has {has}; give another repository")
    return [*theirs.files, package.FILE_NAME]


def _differs(before: Commit, name: str, file: Path | bytes, packed: Package) -> bool:
    there = before.files.get(name)
    return there is None or not there.equals(file, packed.files.get(name))


def _check_arrived(repository: Repository, files: Files, packed: Package) -> None:
    """Raises UserError unless the repository has each of these files now."""
    after = repository.commit()
    wrong = [f for f in sorted(files) if after is None or _differs(after, f, files[f], packed)]
    if wrong:
        raise UserError(
            f"{repository} has another content than was sent in {', '.join(wrong[:5])}; it was "
            "changed meanwhile, here or there; push again"
        )


def _bytes(value: object) -> bytes:
    # As in files of JSON of a RUN.
    return (json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode()


def _size(file: Path | bytes) -> int:
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def _sha256(file: Path | bytes) -> str:
    return hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else sha256(file)
