"""The history of a RUN: what changed its experts, when, and by which command.

Events are part of registry.json, so that a change and its event are written in one step. A renamed
expert keeps its history: `about` follows its earlier names.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from experts.expert import check_types, parse_reference

_JSON_TYPES = {"time": str, "action": str, "experts": dict, "command": str}


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One change of the experts of a RUN."""

    time: str
    """Time in UTC, to the second, such as 2026-11-30T08:00:00+00:00."""
    action: str
    """What was done: init, branch, train, again (a further version is begun), grow, join (languages
    join an expert), rounds, next round, adopt, compress, publish, rollback, retire, restore,
    rename, discard, remove, merge, distil, mix, push, pull."""
    experts: dict[str, str | None]
    """Reference 'NAME@vN' -> its status after the event; None for a record that was removed."""
    command: str
    """Command line of the process that made the change."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else belongs to the action, such as "refusal", why the gate refused an expert that was
    published all the same, "renamed": earlier name -> new name, or "model", which was made of
    experts and is none."""

    def to_json(self) -> dict[str, Any]:
        """Its record in registry.json."""
        return {key: getattr(self, key) for key in _JSON_TYPES} | self.facts

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """The event of a record; UserError for a broken one, which `where` names."""
        check_types(where, value, _JSON_TYPES)
        statuses = {ref: each for ref, each in value["experts"].items() if each is not None}
        check_types(f"{where}: experts", statuses, dict.fromkeys(statuses, str))
        check_types(where, {"renamed": {}} | value, {"renamed": dict})
        renamed = value.get("renamed", {})
        check_types(f"{where}: renamed", renamed, dict.fromkeys(renamed, str))
        for reference in value["experts"]:
            parse_reference(reference)
        facts = {key: value[key] for key in value if key not in _JSON_TYPES}
        return cls(**{key: value[key] for key in _JSON_TYPES}, facts=facts)

    @property
    def renamed(self) -> Mapping[str, str]:
        """Earlier name -> new name; empty unless experts were renamed."""
        return self.facts.get("renamed", {})


def event_of_now(
    action: str, experts: Mapping[str, str | None], facts: Mapping[str, Any] | None = None
) -> Event:
    """The event of a change that this process makes now."""
    return Event(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        action=action,
        experts=dict(experts),
        command=command_line(),
        facts=dict(facts or {}),
    )


def command_line() -> str:
    """The command line of this process, as it would be typed."""
    program = Path(sys.argv[0])
    # What `python -m PACKAGE` runs is PACKAGE/__main__.py.
    package = program.name == "__main__.py" and program.parent.name
    return shlex.join([*(("python", "-m", package) if package else (program.name,)), *sys.argv[1:]])


def about(events: Sequence[Event], name: str) -> list[Event]:
    """The events of one expert, oldest first, with those under its earlier names.

    A name that was given up belongs to the expert that had it, until another expert takes it."""
    found: list[Event] = []
    for event in reversed(events):
        if name in event.renamed and found:
            break  # the earlier events of this name are those of the expert that was renamed
        if name in {parse_reference(reference)[0] for reference in event.experts}:
            found.append(event)
        earlier = {new: old for old, new in event.renamed.items()}
        name = earlier.get(name, name)
    return found[::-1]


def name_now(events: Sequence[Event], name: str) -> str:
    """The present name of the expert that had this name last; the same name if it has it still."""
    places = [place for place, event in enumerate(events) if name in event.renamed]
    for event in events[places[-1] :] if places else ():
        name = event.renamed.get(name, name)
    return name


def retired_since(events: Sequence[Event], reference: str) -> bool:
    """Whether an expert was taken out of use after the training of this version began, and was not
    brought back."""
    retired = False
    for event in about(events, parse_reference(reference)[0]):
        if event.action == "retire":
            retired = True
        elif event.action != "push":  # begins, publishes or brings back a version
            retired = False
    return retired
