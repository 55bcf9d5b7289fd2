"""Progress bars on stderr, with rate and remaining time."""

import sys

from tqdm import tqdm


def bar(total: int | None, label: str, unit: str, *, shown: bool = True) -> tqdm:
    """A bar on a terminal; a line now and then where stderr is a file or a pipe."""
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
