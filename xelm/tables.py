"""Tables for the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from clustering.languages import english_name

if TYPE_CHECKING:
    from xelm.runs.progress import Progress
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


def status(found: "Sequence[Progress]") -> str:
    """One line a training: how far it is, and below the table why some failed."""
    lines = [
        f"{'training':20}{'state':10}{'progress':>9}{'tokens':>16}{'loss':>8}{'tokens/s':>10}"
        f"{'left':>9}  checkpoint"
    ]
    for each in found:
        name = each.name if each.version is None else f"{each.name}@v{each.version}"
        share = f"{each.step / each.steps:.1%}" if each.steps else "-"
        loss = "-" if each.loss is None else f"{each.loss:.3f}"
        rate = "-" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}"
        left = "-" if each.seconds_left is None else duration(each.seconds_left)
        saved = "-"
        if each.checkpoint_step is not None and each.checkpoint_seconds is not None:
            saved = f"step {each.checkpoint_step}, {duration(each.checkpoint_seconds)} ago"
        lines.append(
            f"{name:19} {each.state:10}{share:>9}{each.tokens:>16,}{loss:>8}{rate:>10}{left:>9}"
            f"  {saved}"
        )
    lines += [f"{each.name}: {each.note}" for each in found if each.state == "failed"]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Two units at most: 3d 4h, 5h 12m, 7m 30s, 12s."""
    whole = round(max(seconds, 0))
    for unit, smaller, size, rest in (("d", "h", 86_400, 3600), ("h", "m", 3600, 60)):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // rest}{smaller}"
    return f"{whole // 60}m {whole % 60}s" if whole >= 60 else f"{whole}s"


def _pair(perplexity: float, bits_per_byte: float) -> str:
    return f"{perplexity:.1f} {bits_per_byte:6.3f}"
