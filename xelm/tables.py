"""Tables for the terminal."""

from collections.abc import Sequence

import numpy as np

from clustering.languages import english_name
from xelm.runs.evaluation import Row

# Six columns within a hundred characters or little more.
_WIDTH = 15


def results(rows: Sequence[Row], routings: Sequence[str], seed_languages: Sequence[str]) -> str:
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


def _pair(perplexity: float, bits_per_byte: float) -> str:
    return f"{perplexity:.1f} {bits_per_byte:6.3f}"
