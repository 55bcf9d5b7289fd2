"""`xelm rename RUN`: experts get other names, in all their versions."""

from collections.abc import Mapping
from contextlib import ExitStack

from experts.expert import SEED, parse_reference
from experts.lock import locked, update
from experts.registry import Registry
from xelm.runs.results import change_systems
from xelm.runs.run import Run


def rename(run: Run, names: Mapping[str, str]) -> Registry:
    """The registry of a RUN with experts renamed, in one step that a crash leaves undone or done.

    names: present -> new name. Their rows in the tables of evaluations get the new names too. The
    clusters, and the directories of versions that exist, keep their names. UserError as
    `Registry.rename` raises it, and while another process trains one of these experts or a child of
    one.
    """
    training = [e for e in run.registry().training() if e.parent != SEED]
    children = {e.name for e in training if parse_reference(e.parent)[0] in names}
    with ExitStack() as stack:
        for name in sorted({*names, *names.values(), *children}):
            stack.enter_context(locked(run.directory, f"train-{name}"))
        stack.enter_context(locked(run.directory, "evaluate", wait_seconds=60.0))
        renamed = update(
            run.directory, lambda r: r.rename(names), "rename", {"renamed": dict(names)}
        )
        # After the registry, since a call that was interrupted here does it again.
        change_systems(run, dict(names))
        return renamed
