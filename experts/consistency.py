"""Whether the records of experts contradict each other."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from experts.expert import SEED, Expert


def contradictions(experts: Sequence[Expert]) -> Iterator[str]:
    """What is wrong with all versions of all experts together: names and paths that occur twice,
    unknown parents, versions that descend from themselves, and wrong rounds."""
    for reference, count in _repeated(expert.reference for expert in experts):
        yield f"{reference} is listed {count} times"
    for path, count in _repeated(expert.path for expert in experts):
        yield f"{count} versions share the path {path!r}"
    # Such names would share a folder on a file system that ignores case.
    names = {expert.name for expert in experts}
    for name, count in _repeated(name.lower() for name in names):
        yield f"{count} names differ from {name!r} only in case"
    known = {expert.reference: expert for expert in experts}
    for expert in experts:
        parent = known.get(expert.parent)
        if parent is None and expert.parent != SEED:
            yield f"{expert.reference} has the unknown parent {expert.parent}"
            continue
        if parent and parent.name == expert.name and parent.version >= expert.version:
            yield f"{expert.reference} cannot descend from {parent.reference}"
        if parent and not parent.sha256:
            yield f"{expert.reference} descends from {parent.reference}, which has no weights"
        expected = round_of(parent, expert.name)
        if expert.round != expected:
            came = f"{expected}; got {expert.round}"
            yield f"{expert.reference} from {expert.parent} is of round {came}"


def round_of(parent: Expert | None, name: str) -> int:
    """Round of `name` after `parent`, None being the seed; a new version stays in its round."""
    if parent is None:
        return 1
    return parent.round + (parent.name != name)


def _repeated(values: Iterable[str]) -> list[tuple[str, int]]:
    """The values that occur more than once, and how often."""
    return [(value, count) for value, count in Counter(values).items() if count > 1]
