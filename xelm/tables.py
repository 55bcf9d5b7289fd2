"""Tables for the terminal."""

import math
from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from typing import TYPE_CHECKING, Any

import numpy as np

from clustering.languages import english_name
from xelm.evaluation.cells import router_cells, score_cells, text_cells
from xelm.inference.routing import DEFAULT
from xelm.progress import duration

if TYPE_CHECKING:
    from xelm.data.text_stats import TextStats
    from xelm.evaluation.results import Results, Summary
    from xelm.runs.nearest import Relatives
    from xelm.runs.status import Progress

# Six columns within a hundred characters or little more.
_WIDTH = 15
_PAGE = 110


_MARKS = {
    "?": "? more than 1% of the characters are unknown to the tokenizer: means nothing, in no mean",
    "!": "! more than 1% of the documents are in the text that was trained on",
}


def results(found: "Results", routings: Sequence[str], seed_languages: Sequence[str]) -> str:
    """All tables of an evaluation; of the routings the default comes first.

    seed_languages: those of the RUN's corpus.
    """
    routings = sorted(routings, key=lambda routing: routing != DEFAULT)
    tables = [
        _by_language(found, routings, seed_languages),
        texts(list(found.texts.values())) if found.texts else "",
        _systems(found.summaries),
        _routers(found.summaries),
        *_by_expert(found, seed_languages),
        _windows(found.record),
    ]
    return "\n\n".join(table for table in tables if table)


def _windows(record: Mapping[str, Any]) -> str:
    """How long documents were read; empty for an evaluation by an earlier version."""
    if "context_length" not in record:
        return ""
    length, stride = record["context_length"], record["stride"]
    return f"Documents were read {length} tokens at once, longer ones in windows {stride} apart."


def _by_language(results: "Results", routings: Sequence[str], seed_languages: Sequence[str]) -> str:
    """Perplexity (ppl) and bits per byte by language: seed, dense, and the ensemble by routing.

    The means are over those languages of the corpus that every column has and the tokenizer can
    spell; other languages stand below the means.
    """
    rows, marks = results.rows, {tag: text.marks for tag, text in results.texts.items()}
    unspelled = [tag for tag, text in results.texts.items() if text.unspelled]
    room = max(map(len, marks.values()), default=0)
    columns: list[tuple[str, str | None]] = [("seed", None), ("dense", None)]
    columns += [("ensemble", routing) for routing in routings]
    found = {(row.system, row.routing, row.language): row for row in rows}
    columns = [c for c in columns if any((*c, row.language) in found for row in rows)]
    languages = list(dict.fromkeys(row.language for row in rows))
    trained = [tag for tag in languages if tag in seed_languages]
    titles = [system if routing is None else _by(routing) for system, routing in columns]
    first = next((i for i, (system, _) in enumerate(columns) if system == "ensemble"), None)
    groups = ["ensemble" if i == first else "" for i in range(len(columns))]

    def line(name: str, cells: Sequence[str]) -> str:
        return (f"{name:18}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells)).rstrip()

    def language(tag: str) -> str:
        cells = [found.get((*column, tag)) for column in columns]
        pairs = [_pair(row.perplexity, row.bits_per_byte) if row else "-" for row in cells]
        pairs = [f"{pair}{marks.get(tag, ''):{room}}" for pair in pairs]
        return line(f"{tag:4} {english_name(tag)[:13]}", pairs)

    lines = [line("", groups)] if any(groups) else []
    lines += [line("", titles), line("language", ["ppl bits/B"] * len(columns))]
    lines += [language(tag) for tag in trained]
    common = [tag for tag in trained if all((*column, tag) in found for column in columns)]
    common = [tag for tag in common if tag not in unspelled]
    if common:
        means = [
            _pair(
                float(np.mean([found[*column, tag].perplexity for tag in common])),
                float(np.mean([found[*column, tag].bits_per_byte for tag in common])),
            )
            for column in columns
        ]
        doubt = "!" if any("!" in marks.get(tag, "") for tag in common) else ""
        means = [f"{mean}{doubt:{room}}" for mean in means]
        lines.append(line(f"mean of {len(common)}", means))
    others = [tag for tag in languages if tag not in trained]
    if others:
        lines += ["not in the RUN's corpus:", *(language(tag) for tag in others)]
    lines += [text for mark, text in _MARKS.items() if any(mark in m for m in marks.values())]
    return "\n".join(lines)


def texts(found: "Sequence[TextStats]") -> str:
    """One line for each language: the size of its text, how the tokenizer spells it, exact copies
    and, where it was compared, the share that is in the training text."""
    titles = ("documents", "tokens", "bytes", "tokens/char", "unknown", "byte pieces", "copies")
    widths = (11, 13, 14, 13, 9, 13, 8)
    if any(text.compared is not None for text in found):
        titles, widths = (*titles, "trained on"), (*widths, 12)
    lines = [_line("text", titles, widths)]
    for text in found:
        name = f"{text.language:4} {english_name(text.language)[:13]:13}"
        lines.append(_line(name, text_cells(text), widths))
    return "\n".join(lines)


def _systems(summaries: "Sequence[Summary]") -> str:
    """Means with intervals, and calibration, of seed, dense and ensembles."""
    shown = [each for each in summaries if each.system in ("seed", "dense", "ensemble")]
    shown.sort(key=lambda each: (each.system == "ensemble", each.routing not in (None, DEFAULT)))
    if not shown:
        return ""
    titles = ("bits/B", "in 95 %", "above dense", "in 95 %", "right", "ECE", "Brier")
    widths = (8, 15, 13, 17, 8, 7, 7)
    lines = [_line(f"mean of {len(shown[0].languages)}", titles, widths)]
    lines += [_line(_title(each), score_cells(each), widths) for each in shown]
    return "\n".join(lines)


def _routers(summaries: "Sequence[Summary]") -> str:
    """Statistics of each router over all tokens."""
    shown = [each for each in summaries if each.router is not None]
    if not shown:
        return ""
    titles, widths = ("right", "ECE", "entropy", "read", "regret"), (8, 8, 10, 8, 10)
    lines = [_line("router", titles, widths)]
    for each in sorted(shown, key=lambda each: each.routing != DEFAULT):
        lines.append(_line(_title(each), router_cells(each), widths))
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    """A name in 18 columns, and cells at the right of columns of these widths."""
    return f"{name:18}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))


def _by_expert(found: "Results", seed_languages: Sequence[str]) -> Iterator[str]:
    """Bits per byte of every expert in every language, with what it forgot below; as many experts
    beside each other as a terminal holds."""
    summaries = {each.system: each for each in found.summaries if each.routing is None}
    experts = [name for name in summaries if name not in ("seed", "dense")]
    bits = {(r.system, r.language): r.bits_per_byte for r in found.rows if r.routing is None}
    languages = list(dict.fromkeys(row.language for row in found.rows))
    languages.sort(key=lambda tag: tag not in seed_languages)
    widths = {name: max(8, len(name) + 2) for name in ["seed", *experts]}
    while experts:
        part = ["seed", experts.pop(0)]
        while experts and sum(widths[n] for n in part) + widths[experts[0]] <= _PAGE - 18:
            part.append(experts.pop(0))
        lines = [f"{'bits/B by expert':18}" + "".join(f"{n:>{widths[n]}}" for n in part)]
        for tag in languages:
            best = min((value for (name, t), value in bits.items() if t == tag and name in widths))
            if tag in found.texts and found.texts[tag].unspelled:
                best = -math.inf  # none is
            line = f"{tag:4} {english_name(tag)[:13]:13}"
            for name in part:
                value = bits.get((name, tag))
                cell = "-" if value is None else f"{value:.3f}" + "* "[value > best]
                line += f"{cell:>{widths[name]}}"
            lines.append(line.rstrip())
        for title, of in (("forgotten", "forgetting"), ("transfer gap", "transfer_gap")):
            estimates = [getattr(summaries[name], of) for name in part]
            if any(estimates):
                form = "+.3f" if of == "forgetting" else "+.1%"
                cells = ["" if e is None else f"{e.value:{form}} " for e in estimates]
                line = f"{title:18}"
                line += "".join(f"{cell:>{widths[n]}}" for n, cell in zip(part, cells))
                lines.append(line.rstrip())
        yield "\n".join(lines)


def _title(each: "Summary") -> str:
    return each.system if each.routing is None else _by(each.routing)


def _by(routing: str) -> str:
    # Routing by language is given the language, which other routers must detect.
    return "true language" if routing == "language" else f"by {routing}"


def relatives(found: "Sequence[Relatives]", measures: Sequence[str]) -> str:
    """One line a language: its distance by each measure, a dash where that is unknown, with the
    share of what is compared that is known of both where that is not all; and in a RUN its tokens
    and expert."""

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
            line += f"{'-' if isnan(near.distance) else f'{near.distance:.3f}':>12}"
            line += f"{f'({near.coverage:.0%})':>8}" if known_in_part[measure] else ""
        if in_run:
            tokens = "-" if relative.tokens is None else f"{relative.tokens:,}"
            line += f"{tokens:>14}  {relative.expert or '-'}"
        lines.append(line)
    return "\n".join(lines)


def status(found: "Sequence[Progress]") -> str:
    """One line a training: how far it is, and below the table why some failed, and of which experts
    an earlier version is in use again."""
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
    said = [each for each in found if each.state in ("failed", "done") and each.note]
    lines += [f"{each.name}: {each.note}" for each in said]
    return "\n".join(lines)


def _pair(perplexity: float, bits_per_byte: float) -> str:
    return f"{perplexity:.1f} {bits_per_byte:6.3f}"
