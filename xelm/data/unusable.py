"""What a reading of text could not use, counted by reason with the first places."""

from dataclasses import dataclass, field
from typing import Any

_PLACES = 3


@dataclass(slots=True)
class UnusableRecords:
    """What a reading could not use: how many records by reason, and the first places of each."""

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Counts one unusable record at `place` ("file:line")."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < _PLACES:
            places.append(place)

    def include(self, other: "UnusableRecords") -> None:
        """Counts those of another reading as well."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            places = self.places.setdefault(reason, [])
            places += other.places[reason][: _PLACES - len(places)]

    def total(self) -> int:
        """Unusable records, whatever the reason."""
        return sum(self.counts.values())

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        parts = [
            f"{count} with {reason} (first: {', '.join(self.places[reason])})"
            for reason, count in self.counts.items()
        ]
        return f"{self.total()} records left out: {'; '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        """Counts and first places, for the record of a reading."""
        return {
            reason: {"count": count, "first": self.places[reason]}
            for reason, count in self.counts.items()
        }
