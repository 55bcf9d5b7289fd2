"""Bounds of settings: which values are allowed, and what is said of others."""

from collections.abc import Callable, Iterable
from typing import Any

POSITIVE = (lambda x: x >= 1), "at least 1"
POSITIVE_OR_NONE = (lambda x: x is None or x >= 1), "at least 1"
NOT_NEGATIVE = (lambda x: 0 <= x < 2**31), "at least 0"
NOT_NEGATIVE_OR_NONE = (lambda x: x is None or x >= 0), "at least 0"
SHARE = (lambda x: 0 <= x <= 1), "between 0 and 1"


def faults_of(
    config: Any, names: Iterable[str], allowed: Callable[[Any], bool], wanted: str, part: str = ""
) -> list[str]:
    """Messages for the fields whose value is not allowed."""
    values = {name: getattr(config, name) for name in names}
    return [
        f"{part}{name} must be {wanted}; got {value}"
        for name, value in values.items()
        if not allowed(value)
    ]
