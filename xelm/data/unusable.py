"""Records that a reading of text could not use, counted by reason with the first places."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

_PLACES = 3


@dataclass(slots=True)
class UnusableRecords:
    """Number of unusable records by reason, and the first places of each."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: str, place: str) -> None:
        """Counts one unusable record at `place` ("file:line")."""
        self.counts[reason] += 1
        if len(self.places[reason]) < _PLACES:
            self.places[reason].append(place)

    def include(self, other: "UnusableRecords") -> None:
        """Adds the counts and places of another reading."""
        self.counts += other.counts
        for reason, places in other.places.items():
            self.places[reason] = [*self.places[reason], *places][:_PLACES]

    def total(self) -> int:
        """Number of unusable records, whatever the reason."""
        return self.counts.total()

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        reasons = [
            f"{reason} ({count}, first at {', '.join(self.places[reason])})"
            for reason, count in self.counts.items()
        ]
        records = "1 record was" if self.total() == 1 else f"{self.total()} records were"
        return f"{records} left out: {'; '.join(reasons)}"

    def to_json(self) -> dict[str, Any]:
        """Returns counts and first places by reason, for the record of a reading."""
        return {
            reason: {"count": count, "first": self.places[reason]}
            for reason, count in self.counts.items()
        }
