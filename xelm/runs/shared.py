"""Where models of a RUN can be had on the Hugging Face Hub, as far as the RUN has recorded it."""

from experts.card import Shared
from experts.expert import SEED, Expert, parse_reference
from experts.history import about
from xelm.runs.hub import MAIN
from xelm.runs.run import Run


def shared_parent(run: Run, expert: Expert) -> Shared | None:
    """Where the parent of an expert can be had: the seed under its name on the Hub; an expert where
    it was pushed last alone, or from where it was pulled; and both in a RUN that was pushed last as
    a whole. None where nothing of that is recorded."""
    registry = run.registry()
    if expert.parent == SEED:
        if name := run.record.get("base_model"):
            return Shared(repository=name)
        return _in_whole_run(run, registry.seed_path)
    name, version = parse_reference(expert.parent)
    parent = registry.expert(name, version)
    for event in reversed(about(registry.history, name)):
        versions = {parse_reference(reference)[1] for reference in event.experts}
        if event.action == "push" and event.facts.get("kind") == "expert" and version in versions:
            return _at(event.facts)
    made = parent.made or {}
    if made.get("by") == "adopt" and "commit" in made:
        return _at({"to": made["from"], "commit": made["commit"]})
    return _in_whole_run(run, parent.path, parent.reference) if parent.stored is None else None


def _in_whole_run(run: Run, folder: str, reference: str | None = None) -> Shared | None:
    """The repository to which the RUN was pushed last as a whole, with a complete checkpoint in a
    folder of it; None if there is none. reference: that of the expert."""
    for event in reversed(run.registry().history):
        whole = event.action == "push" and event.facts.get("kind") == "run"
        if whole and (reference is None or reference in event.experts):
            return _at(event.facts, folder)
    return None


def _at(facts: dict[str, str], folder: str | None = None) -> Shared:
    """The commit of a repository that the facts of a push name."""
    repository, _, branch = facts["to"].partition("@")
    revision = facts.get("commit") or (branch if branch != MAIN else None)
    return Shared(repository=repository, revision=revision or None, folder=folder)
