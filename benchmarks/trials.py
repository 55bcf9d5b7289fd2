"""Trials that are measured one after the other, each a line of a file, and what a table shows of
their repetitions: what several experiments share."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

Line = dict[str, Any]
"""What describes a trial, and what was found."""


def read(path: Path) -> list[Line]:
    """The lines of a file that were written whole; empty if there is no file."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def add(path: Path, line: Mapping[str, Any]) -> None:
    """Writes one line at the end of a file."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def interval(values: Sequence[float]) -> str:
    """Mean and half of its 95% interval (Student's t); the value alone if there is but one."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{np.mean(values):.3f} ± {stdtrit(len(values) - 1, 0.975) * error:.3f}"
