"""`xelm remove`: an expert leaves a RUN for good, with its text and its other traces.

The expert is retired first, then its files are deleted, and its records go last. `verify` finds no
fault at any moment, and a removal that was interrupted is finished by the same call.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from clustering.errors import UserError
from clustering.identify import Identifier
from experts import manifest
from experts.expert import SEED, parse_reference
from experts.history import about
from experts.lock import locked, update
from experts.registry import Registry
from xelm.data.store_writer import drop_languages
from xelm.evaluation.report.page import FIGURES, PAGE
from xelm.models.stored import chain
from xelm.runs.check import REMEMBERED
from xelm.runs.combined import made_of
from xelm.runs.fit import learned
from xelm.runs.results import change_systems
from xelm.runs.run import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Removal:
    """What a removal deleted, or would delete, and what it cannot reach."""

    name: str
    """Name of the expert."""
    versions: tuple[str, ...]
    """References of its versions, NAME@vN."""
    deleted: tuple[str, ...]
    """What was deleted, one line each: paths relative to the RUN, and parts of files."""
    remains: tuple[str, ...]
    """Where something of it or of its text still is, one line each."""


def plan_removal(run: Run, name: str) -> Removal:
    """What `remove` would do; nothing changes. UserError as there."""
    registry = run.registry()
    if _was_removed(registry, name):
        return Removal(name=name, versions=(), deleted=(), remains=())
    versions = registry.versions(name)
    _check(run, registry, name)
    return Removal(
        name=name,
        versions=tuple(expert.reference for expert in versions if expert.removed is None),
        deleted=tuple(_deleted(run, registry, name)),
        remains=tuple(_remains(run, registry, name)),
    )


def remove(run: Run, name: str) -> Removal:
    """Deletes an expert in all its versions with its files, its text in the RUN, its logs, its part
    of the routers, and its rows in the tables of evaluations; the history keeps that it was there.

    Where other experts descend from it, a stub of its record stays. An expert that was removed
    already changes nothing. UserError if it is the last published one or was never published, if
    the weights of another expert are stored as differences from its own, if one in training needs
    it, and while another process trains it."""
    with ExitStack() as stack:
        for lock in (f"train-{name}", "evaluate"):
            stack.enter_context(locked(run.directory, lock))
        registry = run.registry()
        if _was_removed(registry, name):
            manifest.forget_removed(run.directory)  # which may have been interrupted
            return Removal(name=name, versions=(), deleted=(), remains=())
        plan, texts = plan_removal(run, name), _texts(run, registry, name)
        for text in texts:
            stack.enter_context(locked(run.directory, f"corpus-{text}"))
        retired = update(run.directory, lambda r: _retired(run, r, name), "retire")
        versions = [e for e in retired.versions(name) if e.removed is None]
        for expert in versions:
            directory = expert.directory(run.directory)
            for path in (directory, run.logs(directory)):
                _delete(path)
                with suppress(OSError):  # versions of an expert that was renamed may be in it
                    path.parent.rmdir()
        for text, tags in texts.items():
            if tags is None:
                _delete(_corpus(run) / text)
            else:
                drop_languages(_corpus(run) / text, tags)
        for path in _work(run, registry, name):
            _delete(run.directory / path)
        _forget_in_routers(run, registry, name)
        change_systems(run, {name: None})
        when = datetime.now(UTC).isoformat(timespec="seconds")
        update(run.directory, lambda r: r.remove(name, when), "remove")
        manifest.forget_removed(run.directory)
    return plan


def _was_removed(registry: Registry, name: str) -> bool:
    versions = [expert for expert in registry.experts if expert.name == name]
    events = about(registry.history, name)
    gone = all(expert.removed is not None for expert in versions)
    return gone and any(event.action == "remove" for event in events)


def _check(run: Run, registry: Registry, name: str) -> None:
    _retired(run, registry, name)
    own = {e.directory(run.directory).absolute(): e.reference for e in registry.versions(name)}
    for expert in registry.experts:
        directory = expert.directory(run.directory)
        if expert.name == name or not directory.exists():
            continue
        bases = [own[base] for base in map(Path.absolute, chain(directory)[1:]) if base in own]
        if bases:
            raise UserError(
                f"{expert.reference} stores only what differs from {bases[0]}, and cannot be read "
                f"without it; remove {expert.name} first, or train it again from the seed"
            )


def _retired(run: Run, registry: Registry, name: str) -> Registry:
    """The registry with an expert retired. UserError as `Registry.retire_expert` raises it, and if
    the training of another expert starts from it or reads its languages."""
    for expert in registry.training():
        origins = [each for each in (expert.parent, expert.donor) if each not in (None, SEED)]
        if expert.name != name and name in [parse_reference(each)[0] for each in origins]:
            raise UserError(
                f"{expert.reference} is in training, and needs {name}; finish it, or give it up "
                f"with: xelm discard {run.directory} {expert.name}"
            )
    return registry.retire_expert(name)


def _deleted(run: Run, registry: Registry, name: str) -> Iterator[str]:
    for expert in registry.versions(name):
        if expert.directory(run.directory).exists():
            yield f"{expert.path}, with its weights, centre and card"
    for text, tags in _texts(run, registry, name).items():
        of = "" if tags is None else f", the text in {' '.join(tags)}"
        if (_corpus(run) / text).exists():
            yield f"corpus/{text}{of}"
    for path in _work(run, registry, name):
        if (run.directory / path).exists() and path != REMEMBERED:  # which is no data
            yield path.as_posix()
    if list((run.directory / "routers").glob("*.npz")):
        yield "routers: its part of what was fitted"
    if change_systems(run, {name: None}, change=False):
        yield f"{run.results.name}: its rows in the tables"
    yield f"registry.json, hashes.json: its records{_stubs(registry, name)}"


def _stubs(registry: Registry, name: str) -> str:
    kept = registry.needed(name)
    return f", but for what the descendants of {', '.join(kept)} need" if kept else ""


def _texts(run: Run, registry: Registry, name: str) -> dict[str, list[str] | None]:
    """Names of tokenised corpora with text of an expert -> its languages there, or None for the
    whole corpus, where it is of no other expert, or of an evaluation, which makes it again."""
    versions = [e for e in registry.versions(name) if e.removed is None]
    others = [
        expert
        for expert in registry.experts
        if expert.name != name and expert.removed is None and not expert.intermediate
    ]
    shared = {"train", *(text for expert in others for text in expert.texts)}
    served = {tag for expert in others for tag in expert.languages}
    own = list(dict.fromkeys(tag for expert in versions for tag in expert.languages))
    alone = [tag for tag in own if tag not in served]
    # The documents of one cluster are not told apart from others in the corpus of the RUN.
    by_documents = any(expert.documents is not None for expert in versions)
    found: dict[str, list[str] | None] = {}
    for text in dict.fromkeys(text for expert in versions for text in expert.texts):
        if text not in shared:
            found[text] = None
        elif not by_documents and alone and (_corpus(run) / text / "store.json").exists():
            found[text] = alone
    # What a removal that was interrupted left of them has the other name.
    for folder in (*_corpus(run).glob("evaluation-*"), *_corpus(run).glob(".evaluation-*.partial")):
        if not by_documents and any((folder / f"{tag}.ids").exists() for tag in alone):
            found[folder.name.removeprefix(".").removesuffix(".partial")] = None
    return found


def _work(run: Run, registry: Registry, name: str) -> list[Path]:
    """Paths, relative to the RUN, of what trainings, checks and reports left of an expert."""
    versions, taken = registry.versions(name), {expert.name for expert in registry.experts}
    before = {parse_reference(expert.first_reference)[0] for expert in versions}
    paths = [run.training(name), run.directory / REMEMBERED]
    for one in sorted({name, *(before - taken)}):  # a log keeps the name that its expert had
        paths += [run.failure(one), run.training(f"{one}.log")]
    paths += [run.logs(expert.directory(run.directory)) for expert in versions]
    paths += [run.results / PAGE, run.results / FIGURES]  # xelm report makes them again
    return [path.relative_to(run.directory) for path in paths]


def _forget_in_routers(run: Run, registry: Registry, name: str) -> None:
    """Leaves an expert out of what was fitted: its column of the learned router, and the languages
    that it alone serves in the identifier. What only the text can give is fitted again when it is
    needed; of a RUN without its text, the detector of unknown languages is deleted."""
    folder, remaining = run.directory / "routers", run.registry().published()
    if list(folder.glob("learned-*.npz")):
        learned(run, remaining)
    for file in folder.glob("novelty-*.npz"):
        file.unlink()
    others = {tag for expert in remaining for tag in expert.languages}
    gone = {tag for expert in registry.versions(name) for tag in expert.languages} - others
    for file in folder.glob("languages-*.npz"):
        if not run.has_text:
            known = Identifier.load(file)
            if not gone & set(known.languages):
                continue
            path = file.with_name(f"languages-{len(known.languages) - 1}-without-{len(gone)}.npz")
            manifest.write(run.directory, f"routers/{path.name}", known.without(gone).save)
        file.unlink()


def _remains(run: Run, registry: Registry, name: str) -> Iterator[str]:
    """Lines that say where something of an expert, or of its text, is after its removal."""
    versions = registry.versions(name)
    tags = list(dict.fromkeys(tag for e in versions for tag in e.documents or e.languages))
    trained = [tag for tag in tags if tag in run.languages]
    if trained and run.record.get("seed_from") is None:
        yield f"seed, tokenizer: trained on text in {' '.join(trained)} too"
    if trained:
        yield f"vectoriser.npz: counts of subwords in text in {' '.join(trained)} too"
    if trained and run.dense.exists():
        yield f"dense: trained on text in {' '.join(trained)} too"
    for model in run.combined():
        if any(each.partition("@")[0] == name for each in made_of(run, registry, model)):
            yield f"{model}: made of it; delete the folder, and make it again of the others"
    descended: dict[str, None] = {}
    for origin, others in registry.needed(name).items():
        for other in others:
            descended[other] = None
            yield (
                f"{other}: descends from {origin}, or read its languages; remove it too, or: xelm "
                f"train {run.directory} {parse_reference(other)[0]} --again --from seed"
            )
    texts = {text for e in versions for text in e.texts if e.documents is None}
    for expert in registry.experts:
        read = [
            tag
            for tag, some in (expert.data or {}).items()
            if tag in tags and any(each["text"] in texts for each in some)
        ]
        if expert.name != name and expert.reference not in descended and read:
            yield f"{expert.reference}: read its text in {' '.join(read)}"
    if clusters := dict.fromkeys(e.cluster for e in versions if e.cluster is not None):
        yield f"clusters.json: the name and the languages of its cluster, {', '.join(clusters)}"
    if any(expert.documents is not None for expert in versions):
        yield "corpus/train: the documents of its cluster, among those of others"
    for event in about(registry.history, name):
        if event.action == "push":
            to, commit = event.facts.get("to"), str(event.facts.get("commit"))[:12]
            yield f"{to}: pushed there as commit {commit}; older commits keep it after a new push"
    sources = dict.fromkeys(
        str(each["corpus"])
        for expert in versions
        for tag, some in (expert.data or {}).items()
        if tag in tags
        for each in some
    )
    yield from (f"{source}: the text itself, outside the RUN" for source in sources)
    yield "history: that it was there, and when"
    yield "what is not known here: exported copies, pulled RUNs, backups"


def _corpus(run: Run) -> Path:
    return run.directory / "corpus"


def _delete(path: Path) -> None:
    """Deletes a file or a folder, if it is there. A folder gets another name first: if this is
    interrupted, nothing takes what is left for the whole."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if path.is_dir():
        path.rename(partial)
        shutil.rmtree(partial, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
