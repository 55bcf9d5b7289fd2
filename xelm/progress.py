"""Progress bars on stderr, with rate and remaining time; durations for people."""

import sys

from tqdm import tqdm


def bar(total: int | None, label: str, unit: str, *, shown: bool = True) -> tqdm:
    """A progress bar on a terminal; a line now and then where stderr is a file or a pipe."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        disable=not shown,
        desc=label,
        unit=unit,
        unit_scale=True,
        file=sys.stderr,
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else 15.0,
        leave=True,
        ascii=None if terminal else True,
        ncols=None if terminal else 100,
    )


def duration(seconds: float) -> str:
    """A duration in two units at most: 3d 4h, 5h 12m, 7m 30s, 12s."""
    whole = round(max(seconds, 0))
    for unit, smaller, size, rest in (("d", "h", 86_400, 3600), ("h", "m", 3600, 60)):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // rest}{smaller}"
    return f"{whole // 60}m {whole % 60}s" if whole >= 60 else f"{whole}s"
