"""Tables for the terminal."""

from collections.abc import Sequence

import numpy as np

from clustering.languages import english_name
from xelm.runs.evaluation import Row


def results(rows: Sequence[Row], routings: Sequence[str] = ("language",)) -> str:
    """Perplexity and bits per byte by language: seed, dense, and the ensemble by routing; the last
    line is the mean over the languages that every column has."""
    columns: list[tuple[str, str | None]] = [("seed", None), ("dense", None)]
    columns += [("ensemble", routing) for routing in routings]
    found = {(row.system, row.routing, row.language): row for row in rows}
    columns = [c for c in columns if any((*c, tag) in found for _, _, tag in found)]
    languages = list(dict.fromkeys(row.language for row in rows))
    titles = [system if routing is None else f"by {routing}" for system, routing in columns]
    lines = [
        f"{'':22}" + "".join(f"{title:>19}" for title in titles),
        f"{'language':22}" + f"{'perplexity   bits/B':>19}" * len(columns),
    ]
    common = [tag for tag in languages if all((*c, tag) in found for c in columns)]
    for tag in languages:
        cells = [found.get((*column, tag)) for column in columns]
        name = f"{tag:4}{english_name(tag)[:17]}"
        lines.append(f"{name:22}" + "".join(map(_cell, cells)))
    if common:
        means = [
            (
                np.mean([found[*c, tag].perplexity for tag in common]),
                np.mean([found[*c, tag].bits_per_byte for tag in common]),
            )
            for c in columns
        ]
        title = f"mean of {len(common)}"
        lines.append(f"{title:22}" + "".join(f"{a:>11.1f}{b:>8.3f}" for a, b in means))
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    return (
        f"{'-':>11}{'-':>8}" if row is None else f"{row.perplexity:>11.1f}{row.bits_per_byte:>8.3f}"
    )
