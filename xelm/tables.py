"""Tables for the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from clustering.languages import english_name

if TYPE_CHECKING:
    from xelm.runs.relatives import Relatives
    from xelm.runs.results import Row

# Six columns within a hundred characters or little more.
_WIDTH = 15


def results(rows: "Sequence[Row]", routings: Sequence[str], seed_languages: Sequence[str]) -> str:
    """Perplexity (ppl) and bits per byte by language: seed, dense, and the ensemble by routing.

    seed_languages: those that seed and dense were trained on. The means are over those of them
    that every column has; other languages stand below the means.
    """
    columns: list[tuple[str, str | None]] = [("seed", None), ("dense", None)]
    columns += [("ensemble", routing) for routing in routings]
    found = {(row.system, row.routing, row.language): row for row in rows}
    columns = [c for c in columns if any((*c, row.language) in found for row in rows)]
    languages = list(dict.fromkeys(row.language for row in rows))
    trained = [tag for tag in languages if tag in seed_languages]
    titles = [system if routing is None else f"by {routing}" for system, routing in columns]
    first = next((i for i, (system, _) in enumerate(columns) if system == "ensemble"), None)
    groups = ["ensemble" if i == first else "" for i in range(len(columns))]

    def line(name: str, cells: Sequence[str]) -> str:
        return (f"{name:18}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells)).rstrip()

    def language(tag: str) -> str:
        cells = [found.get((*column, tag)) for column in columns]
        pairs = [_pair(row.perplexity, row.bits_per_byte) if row else "-" for row in cells]
        return line(f"{tag:4} {english_name(tag)[:13]}", pairs)

    lines = [line("", groups)] if any(groups) else []
    lines += [line("", titles), line("language", ["ppl bits/B"] * len(columns))]
    lines += [language(tag) for tag in trained]
    common = [tag for tag in trained if all((*column, tag) in found for column in columns)]
    if common:
        means = [
            _pair(
                float(np.mean([found[*column, tag].perplexity for tag in common])),
                float(np.mean([found[*column, tag].bits_per_byte for tag in common])),
            )
            for column in columns
        ]
        lines.append(line(f"mean of {len(common)}", means))
    others = [tag for tag in languages if tag not in trained]
    if others:
        lines += ["not in the RUN's corpus:", *(language(tag) for tag in others)]
    return "\n".join(lines)


def relatives(found: "Sequence[Relatives]", measures: Sequence[str]) -> str:
    """One line a language: its distance by each measure, with the share of features known of both
    where that is not all; and in a RUN its tokens and expert."""

    in_run = any(relative.tokens is not None or relative.expert for relative in found)
    known_in_part = {
        measure: any(relative.by_measure[measure].coverage < 0.995 for relative in found)
        for measure in measures
    }
    title = f"{'language':18}"
    for measure in measures:
        title += f"{measure:>12}" + (f"{'(known)':>8}" if known_in_part[measure] else "")
    lines = [title + (f"{'tokens':>14}  expert" if in_run else "")]
    for relative in found:
        line = f"{relative.language:4} {english_name(relative.language)[:13]:13}"
        for measure in measures:
            near = relative.by_measure[measure]
            line += f"{near.distance:>12.3f}"
            line += f"{f'({near.coverage:.0%})':>8}" if known_in_part[measure] else ""
        if in_run:
            tokens = "-" if relative.tokens is None else f"{relative.tokens:,}"
            line += f"{tokens:>14}  {relative.expert or '-'}"
        lines.append(line)
    return "\n".join(lines)


def _pair(perplexity: float, bits_per_byte: float) -> str:
    return f"{perplexity:.1f} {bits_per_byte:6.3f}"
