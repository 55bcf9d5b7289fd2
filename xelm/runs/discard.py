"""`xelm discard`: gives up an unfinished training and deletes what it left."""

import shutil
from pathlib import Path

from clustering.errors import UserError
from experts.expert import Expert
from experts.lock import locked, update
from experts.registry import Registry
from xelm.data.parts import tag_of
from xelm.runs.run import Run


def discard(run: Run, name: str) -> Expert | Path | None:
    """Deletes the checkpoints of an unfinished training: of "dense", or of an expert by name.

    A grown expert, or a further version of one, leaves the registry with the text that was
    tokenised for it alone. The first version of a branched expert stays, since its cluster belongs
    to the RUN. Of a growth that ended before its expert was in the registry, the text is deleted.
    Returns the expert whose record was removed, or the folder of such a text, or None. UserError if
    nothing of that name is in training, or while another process trains it.
    """
    if name == "dense":
        with locked(run.directory, "train-dense"):
            if run.dense.exists() or not run.training(name).exists():
                state = "trained to the end" if run.dense.exists() else "not in training"
                raise UserError(f"the dense baseline of {run.directory} is {state}")
            _delete_work(run, name)
        return None
    with locked(run.directory, f"train-{name}"):
        # Read under the lock: a process that trains the expert publishes it under the same lock.
        registry = run.registry()
        if text := _text_alone(run, registry, name):
            for folder in text:
                shutil.rmtree(folder)
            return run.directory / "corpus" / name
        registry.discard(name)  # refuses what is not in training
        expert = next(e for e in registry.training() if e.name == name)
        # The record goes last: a discard that was interrupted can be run again.
        _delete_work(run, name)
        shutil.rmtree(expert.directory(run.directory), ignore_errors=True)
        if expert.cluster is not None and expert.version == 1:
            return None
        registry = update(run.directory, lambda r: r.discard(name))
        used = {tag for other in registry.experts for tag in other.languages}
        for tag in expert.languages:
            if tag not in used and tag not in run.languages:
                shutil.rmtree(run.directory / "corpus" / tag, ignore_errors=True)
    return expert


def _text_alone(run: Run, registry: Registry, name: str) -> list[Path]:
    """Folders with text, finished or not, that was tokenised to grow an expert of this name which
    does not exist."""
    if name in run.languages or tag_of(name) != name:
        return []  # the RUN's own text, or that of an evaluation
    if any(name == e.name or name in e.languages for e in registry.experts):
        return []
    corpus = run.directory / "corpus"
    # What a store is written into before it gets its name.
    return [path for path in (corpus / name, corpus / f".{name}.partial") if path.is_dir()]


def _delete_work(run: Run, name: str) -> None:
    shutil.rmtree(run.training(name), ignore_errors=True)
    run.failure(name).unlink(missing_ok=True)
