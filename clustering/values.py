"""Equality of immutable dataclasses that contain arrays."""

from dataclasses import fields
from typing import Any

import numpy as np


class ArrayValue:
    """Base of dataclasses (`eq=False`) that are equal if all fields are: arrays by dtype and
    values, dictionaries also by order, since clusters are in the order of their centres."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        names = [field.name for field in fields(self)]  # pyright: ignore[reportArgumentType]
        return all(_equal(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # type: ignore[assignment]  # arrays do not hash


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(
            one, other, equal_nan=one.dtype.kind == "f"
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one.items()) == list(other.items())
    return type(one) is type(other) and one == other
