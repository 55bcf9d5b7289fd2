"""`xelm discard`: gives up an unfinished training and deletes what it left."""

import re
import shutil
from contextlib import suppress
from pathlib import Path

from clustering.errors import UserError
from experts.expert import Expert
from experts.history import about
from experts.lock import locked, update
from experts.registry import Registry
from xelm.data.parts import tag_of
from xelm.runs.run import Run
from xelm.runs.shares import unused_text


def discard(run: Run, name: str) -> Expert | Path | None:
    """Deletes the checkpoints of an unfinished training: of "dense", of a student or mixture
    ("students/NAME", "mixes/NAME"), or of an expert by name.

    A grown expert, or a further version of one, leaves the registry with the text that was
    tokenised for it alone. The first version of a branched expert stays, since its cluster belongs
    to the RUN. Of a growth or a further version that ended before it was in the registry, the text
    is deleted. Returns the expert whose record was removed, or the folder of such a text, or None.
    An expert that was discarded already changes nothing. UserError if nothing of that name is in
    training, or while another process trains it.
    """
    if name == "dense" or "/" in name:
        with locked(run.directory, f"train-{run.training(name).name}"):
            done = name in run.combined() or (name == "dense" and run.dense.exists())
            if done or not run.training(name).exists():
                state = "trained to the end" if done else "not in training"
                what = "the dense baseline" if name == "dense" else name
                raise UserError(f"{what} of {run.directory} is {state}")
            _delete_work(run, name)
            if "/" in name:  # written, and not recorded yet
                _delete(run.directory / name)
        return None
    with locked(run.directory, f"train-{name}"):
        # Read under the lock: a process that trains the expert publishes it under the same lock.
        registry = run.registry()
        if text := _text_alone(run, registry, name):
            _delete(text)
            return text
        if _was_discarded(registry, name):
            return None
        registry.discard(name)  # refuses what is not in training
        expert = next(e for e in registry.training() if e.name == name)
        # The record goes last: a discard that was interrupted can be run again.
        _delete_work(run, name)
        directory = expert.directory(run.directory)
        _delete(directory)
        with suppress(OSError):  # other versions are in it, or it was never made
            directory.parent.rmdir()
        if expert.cluster is not None and expert.version == 1:
            return None
        registry = update(run.directory, lambda r: r.discard(name), "discard")
        used = {"train", *(text for other in registry.experts for text in other.texts)}
        for text in sorted(set(expert.texts) - used):
            _delete(run.directory / "corpus" / text)
    return expert


def _was_discarded(registry: Registry, name: str) -> bool:
    events = about(registry.history, name)
    unknown = all(expert.name != name for expert in registry.experts)
    return unknown and bool(events) and events[-1].action == "discard"


def _text_alone(run: Run, registry: Registry, name: str) -> Path | None:
    """Folder with text, finished or not, that was tokenised for an expert or a version of this name
    which does not exist; None if there is none."""
    versions = [expert for expert in registry.experts if expert.name == name]
    if any(expert.status == "training" for expert in versions):
        return None
    names = [f"{name}-v{registry.next_version(name)}"] if versions else []
    served = any(name in e.languages and e.status != "retired" for e in registry.experts)
    # Other names are of the RUN's own text, and of evaluations.
    if name not in run.languages and _names_languages(name) and not served:
        names.append(name)
    texts = [run.directory / "corpus" / unused_text(registry, wanted) for wanted in names]
    return next((text for text in texts if text.is_dir() or _partial(text).is_dir()), None)


def _names_languages(name: str) -> bool:
    """Whether a name is that of a language or of a cluster of them, such as az-kk or az-plus5."""
    if tag_of(name) == name:
        return True
    first, *others = name.partition("_")[0].split("-")
    return tag_of(first) == first and all(
        tag_of(part) == part or re.fullmatch("plus[0-9]+", part) for part in others
    )


def _delete_work(run: Run, name: str) -> None:
    _delete(run.training(name))
    run.failure(name).unlink(missing_ok=True)


def _delete(folder: Path) -> None:
    """Deletes a folder, if it exists. It gets another name first: if this is interrupted, nothing
    takes what is left for the whole."""
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    if folder.exists():
        folder.rename(partial)
        shutil.rmtree(partial, ignore_errors=True)


def _partial(folder: Path) -> Path:
    """Name of a folder that is being written, or deleted."""
    return folder.with_name(f".{folder.name}.partial")
