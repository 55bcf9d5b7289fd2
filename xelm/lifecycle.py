"""Methods of a RUN that bring versions of experts into use, take them out of it, and tell of them.

Each method does what the command of its name does. A method imports what it needs when it is
called.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from xelm.runs import run as runs

if TYPE_CHECKING:
    from experts.expert import Expert
    from experts.history import Event
    from experts.registry import Registry
    from xelm.runs.compare import Comparison, ListedExpert
    from xelm.runs.remove import Removal


class Lifecycle(runs.Run):
    """A RUN with what can be done with the versions of its experts."""

    __slots__ = ()

    def publish(self, name: str) -> "Expert":
        """Publishes a trained expert although it is worse than the gate allows."""
        from xelm.runs.fitted import fit_published
        from xelm.runs.publish import publish_anyway

        expert = publish_anyway(self, name)
        fit_published(self)
        return expert

    def retire(self, name: str) -> "Expert":
        """Takes an expert out of use: it is neither served nor a parent of new experts. Its files
        stay, and `restore` brings it back."""
        from experts.lock import update

        registry = update(self.directory, lambda r: r.retire_expert(name), "retire")
        return registry.last_in_use(name) or registry.expert(name)

    def restore(self, name: str, version: int | None = None) -> "Expert":
        """Publishes a retired expert again; None takes the version that was in use."""
        from experts.lock import update
        from xelm.runs.fitted import fit_published

        change = update(self.directory, lambda r: r.restore(name, version), "restore")
        fit_published(self)
        return change.expert(name)

    def experts(self) -> "list[ListedExpert]":
        """All versions of all experts, with what is recorded of them."""
        from xelm.runs.compare import list_experts

        return list_experts(self)

    def diff(self, first: str, second: str) -> "Comparison":
        """How two models differ: figures, data, settings, parent, tokens. first, second: 'NAME',
        'NAME@vN' or 'seed'."""
        from xelm.runs.compare import compare

        return compare(self, first, second)

    def rename(self, names: Mapping[str, str]) -> "Registry":
        """Renames experts, in all their versions and as parents. names: present -> new name."""
        from xelm.runs.rename import rename

        return rename(self, names)

    def history(self, name: str | None = None) -> "list[Event]":
        """What changed the experts, oldest first. name: of one expert, with what happened under its
        earlier names; None: of all."""
        from experts.history import about

        registry = self.registry()
        if name is None:
            return list(registry.history)
        found = about(registry.history, name)
        if not found:
            registry.versions(name)  # refuses a name that no expert has
        return found

    def rollback(self, name: str, version: int | None = None) -> "Expert":
        """Publishes an earlier version of an expert again; None takes the one in use before."""
        from experts.lock import update
        from xelm.runs.fitted import fit_published

        change = update(self.directory, lambda r: r.rollback(name, version), "rollback")
        fit_published(self)
        return change.expert(name)

    def discard(self, name: str) -> "Expert | Path | None":
        """Gives up an unfinished training, of an expert or of "dense", and deletes its checkpoints.
        Returns what `xelm.runs.discard.discard` says."""
        from xelm.runs.discard import discard

        return discard(self, name)

    def remove(self, name: str) -> "Removal":
        """Deletes an expert for good, with its text in the RUN and its other traces. Says what
        remains elsewhere."""
        from xelm.runs.remove import remove

        return remove(self, name)

    def plan_removal(self, name: str) -> "Removal":
        """What `remove` would delete and what would remain; nothing changes."""
        from xelm.runs.remove import plan_removal

        return plan_removal(self, name)
