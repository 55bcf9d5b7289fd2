"""Tables for the terminal."""

import math
import re
from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from clustering.languages import english_name
from xelm.evaluation.cells import router_cells, score_cells, text_cells
from xelm.evaluation.results import System
from xelm.inference.routing import DEFAULT
from xelm.progress import duration

if TYPE_CHECKING:
    from experts.history import Event
    from xelm.data.text_stats import TextStats
    from xelm.evaluation.results import Results, Summary
    from xelm.runs.compare import Comparison, ListedExpert
    from xelm.runs.nearest import Relatives
    from xelm.runs.push import Pushed
    from xelm.runs.remove import Removal
    from xelm.runs.status import Progress

_WIDTH = 15
"""Characters of a column of perplexities: six columns take a hundred characters or little more."""
_PAGE = 110
"""Characters beyond which no further expert is put beside the others."""
_VALUE = 28
"""Characters of a value in a comparison: a line has a name of about 40 and two values."""
_HASH = re.compile(r"[0-9a-f]{64}")
_EXPLAINED = ("failed", "kept back", "done")
"""States of trainings whose note `status` shows."""
_NAMED_EXPERTS = 2
"""Number of experts of an event, of one status, that are named: a round of training has many."""
_MARKS = {
    "?": "? more than 1% of the characters are unknown to the tokenizer: means nothing, in no mean",
    "!": "! more than 1% of the documents are in the text that was trained on",
}


def results(found: "Results", routings: Sequence[str], seed_languages: Sequence[str]) -> str:
    """All tables of an evaluation; the default routing comes first. seed_languages: the RUN's."""
    routings = sorted(routings, key=lambda routing: routing != DEFAULT)
    length, stride = (found.record[name] for name in ("context_length", "stride"))
    # Not those with summaries alone: a grown expert may be measured on its own language only.
    single = list(dict.fromkeys(row.system for row in found.rows if row.routing is None))
    combined = [name for name in single if System(name).is_combined]
    experts = [name for name in single if name not in ("seed", "dense", *combined)]
    tables = [
        _by_language(found, routings, seed_languages),
        texts(list(found.texts.values())) if found.texts else "",
        _systems(found.summaries),
        _routers(found.summaries),
        *_by_model("bits/B", found, seed_languages, combined, ["seed", "dense"]),
        *_by_model("bits/B by expert", found, seed_languages, experts, ["seed"]),
        f"Documents were read {length} tokens at once, longer ones in windows {stride} apart.",
    ]
    return "\n\n".join(table for table in tables if table)


def _by_language(results: "Results", routings: Sequence[str], seed_languages: Sequence[str]) -> str:
    """Perplexity (ppl) and bits per byte by language: seed, dense, and the ensemble by routing.

    The means are over those languages of the corpus that every column has and the tokenizer can
    spell; other languages stand below the means.
    """
    marks = {tag: text.marks for tag, text in results.texts.items()}
    room = max(map(len, marks.values()), default=0)
    found = {(row.system, row.routing, row.language): row for row in results.rows}
    columns: list[tuple[str, str | None]] = [("seed", None), ("dense", None)]
    columns += [("ensemble", routing) for routing in routings]
    columns = [column for column in columns if column in {key[:2] for key in found}]
    languages = list(dict.fromkeys(row.language for row in results.rows))
    trained = [tag for tag in languages if tag in seed_languages]
    others = [tag for tag in languages if tag not in trained]
    widths = [_WIDTH] * len(columns)

    def line(tag: str) -> str:
        rows = [found.get((*column, tag)) for column in columns]
        pairs = [_pair(row.perplexity, row.bits_per_byte) if row else "-" for row in rows]
        return _line(_name(tag), [f"{pair}{marks.get(tag, ''):{room}}" for pair in pairs], widths)

    ensemble = next((column for column in columns if column[0] == "ensemble"), None)
    groups = ["ensemble" if column == ensemble else "" for column in columns]
    lines = [_line("", groups, widths)] if ensemble else []
    titles = [system if routing is None else _by(routing) for system, routing in columns]
    lines += [_line("", titles, widths), _line("language", ["ppl bits/B"] * len(columns), widths)]
    lines += [line(tag) for tag in trained]
    common = [tag for tag in trained if all((*column, tag) in found for column in columns)]
    common = [tag for tag in common if tag not in results.texts or not results.texts[tag].unspelled]
    if common:
        doubt, means = "!" if any("!" in marks.get(tag, "") for tag in common) else "", []
        for column in columns:
            rows = [found[*column, tag] for tag in common]
            perplexity = float(np.mean([row.perplexity for row in rows]))
            bits_per_byte = float(np.mean([row.bits_per_byte for row in rows]))
            means.append(f"{_pair(perplexity, bits_per_byte)}{doubt:{room}}")
        lines.append(_line(f"mean of {len(common)}", means, widths))
    if others:
        lines += ["not in the RUN's corpus:", *(line(tag) for tag in others)]
    lines += [text for mark, text in _MARKS.items() if any(mark in m for m in marks.values())]
    return "\n".join(lines)


def texts(found: "Sequence[TextStats]") -> str:
    """One line for each language: the size of its text, how the tokenizer spells it, exact copies
    and, where it was compared, the share that is in the training text."""
    titles = ("documents", "tokens", "bytes", "tokens/char", "unknown", "byte pieces", "copies")
    widths = (11, 13, 14, 13, 9, 13, 8)
    if any(text.compared is not None for text in found):
        titles, widths = (*titles, "trained on"), (*widths, 12)
    lines = [_line(_name(text.language), text_cells(text), widths) for text in found]
    return "\n".join([_line("text", titles, widths), *lines])


def _systems(summaries: "Sequence[Summary]") -> str:
    """Means with intervals, and calibration, of seed, dense, merged models and ensembles."""
    general = ("seed", "dense", "ensemble")
    shown = [s for s in summaries if s.system in general or System(s.system).is_combined]
    shown.sort(key=lambda each: (each.system == "ensemble", each.routing not in (None, DEFAULT)))
    if not shown:
        return ""
    titles = ("bits/B", "in 95 %", "above dense", "in 95 %", "right", "ECE", "Brier")
    widths = (8, 15, 13, 17, 8, 7, 7)
    rows = [(f"mean of {len(shown[0].languages)}", titles)]
    rows += [(_title(each), score_cells(each)) for each in shown]
    room = max(18, *(len(name) + 1 for name, _ in rows))
    return "\n".join(f"{name:{room}}{_cells(cells, widths)}".rstrip() for name, cells in rows)


def _routers(summaries: "Sequence[Summary]") -> str:
    """Statistics of each router over all tokens."""
    shown = [each for each in summaries if each.router is not None]
    if not shown:
        return ""
    titles, widths = ("right", "ECE", "entropy", "read", "regret"), (8, 8, 10, 8, 10)
    shown.sort(key=lambda each: each.routing != DEFAULT)
    lines = [_line(_title(each), router_cells(each), widths) for each in shown]
    return "\n".join([_line("router", titles, widths), *lines])


def _by_model(
    title: str,
    found: "Results",
    seed_languages: Sequence[str],
    models: Sequence[str],
    beside: Sequence[str],
) -> Iterator[str]:
    """Bits per byte of these models in every language, with what they forgot below; as many as a
    terminal holds. beside: models that stand in each table, if they were measured."""
    summaries = {each.system: each for each in found.summaries if each.routing is None}
    bits = {(r.system, r.language): r.bits_per_byte for r in found.rows if r.routing is None}
    measured = {name for name, _ in bits}
    beside, models = [name for name in beside if name in measured], list(models)
    languages = list(dict.fromkeys(row.language for row in found.rows))
    languages.sort(key=lambda tag: tag not in seed_languages)
    width_of = {name: max(8, len(name) + 2) for name in [*beside, *models]}
    best = {
        tag: min(value for (name, t), value in bits.items() if t == tag and name in width_of)
        for tag in (languages if models else ())
        if tag not in found.texts or not found.texts[tag].unspelled
    }
    while models:
        part = [*beside, models.pop(0)]
        while models and sum(width_of[n] for n in [*part, models[0]]) <= _PAGE - 18:
            part.append(models.pop(0))
        widths = [width_of[name] for name in part]
        lines = [_line(title, part, widths)]
        for tag in languages:
            values = [bits.get((name, tag)) for name in part]
            marked = [v is not None and tag in best and v <= best[tag] for v in values]
            cells = ["-" if v is None else f"{v:.3f}{'* '[not m]}" for v, m in zip(values, marked)]
            lines.append(_line(_name(tag), cells, widths))
        known = [summaries.get(name) for name in part]
        forgotten = [each and each.forgetting for each in known]
        gaps = [each and each.transfer_gap for each in known]
        for name, estimates, form in (
            ("forgotten", forgotten, "+.3f"),
            ("transfer gap", gaps, "+.1%"),
        ):
            if any(estimates):
                cells = ["" if e is None else f"{e.value:{form}} " for e in estimates]
                lines.append(_line(name, cells, widths))
        yield "\n".join(lines)


def _title(each: "Summary") -> str:
    return each.system if each.routing is None else _by(each.routing)


def _by(routing: str) -> str:
    # Routing by language is given the language, which other routers must detect.
    return "true language" if routing == "language" else f"by {routing}"


def relatives(found: "Sequence[Relatives]", measures: Sequence[str]) -> str:
    """One line a language: its distance by each measure, a dash where that is unknown, the share of
    what is compared that is known of both where that is not all, and in a RUN tokens and expert."""
    titles, widths = [], []
    in_part = [m for m in measures if any(one.by_measure[m].coverage < 0.995 for one in found)]
    for measure in measures:
        titles += [measure, "(known)"] if measure in in_part else [measure]
        widths += [12, 8] if measure in in_part else [12]
    in_run = any(relative.tokens is not None or relative.expert for relative in found)
    titles, widths = (titles + ["tokens"] * in_run), (widths + [14] * in_run)
    lines = [_line("language", titles, widths) + "  expert" * in_run]
    for relative in found:
        cells = []
        for measure in measures:
            near = relative.by_measure[measure]
            cells.append("-" if math.isnan(near.distance) else f"{near.distance:.3f}")
            if measure in in_part:
                cells.append(f"({near.coverage:.0%})")
        if in_run:
            cells.append("-" if relative.tokens is None else f"{relative.tokens:,}")
        expert = f"  {relative.expert or '-'}" if in_run else ""
        lines.append(_line(_name(relative.language), cells, widths) + expert)
    return "\n".join(lines)


def status(found: "Sequence[Progress]") -> str:
    """One line a training: how far it is, and below the table why some failed or were kept back and
    of which experts an earlier version is in use again."""
    titles, widths = ("progress", "tokens", "loss", "tokens/s", "left"), (9, 16, 8, 10, 9)
    lines = [f"{'training':20}{'state':10}" + _cells(titles, widths) + "  checkpoint"]
    for each in found:
        name = each.name if each.version is None else f"{each.name}@v{each.version}"
        cells = [
            f"{each.step / each.steps:.1%}" if each.steps else "-",
            # What was made elsewhere, or of another version, has no training here.
            "-" if each.state == "done" and not each.tokens else f"{each.tokens:,}",
            "-" if each.loss is None else f"{each.loss:.3f}",
            "-" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}",
            "-" if each.seconds_left is None else duration(each.seconds_left),
        ]
        saved = "-"
        if each.checkpoint_step is not None and each.checkpoint_seconds is not None:
            saved = f"step {each.checkpoint_step}, {duration(each.checkpoint_seconds)} ago"
        lines.append(f"{name:19} {each.state:10}{_cells(cells, widths)}  {saved}")
    said = [each for each in found if each.state in _EXPLAINED and each.note]
    return "\n".join([*lines, *(f"{each.name}: {each.note}" for each in said)])


def history(events: "Sequence[Event]") -> str:
    """One line an event: when, what, the experts with their status after it, and the command; below
    it what else belongs to it, such as figures of a gate that was overridden."""
    rows, notes = [("time (UTC)", "action", "experts", "command")], [[]]
    for event in events:
        experts = [*_statuses(event), *(f"{a} is now {b}" for a, b in event.renamed.items())]
        others = {key: event.facts[key] for key in event.facts if key != "renamed"}
        time = event.time.removesuffix("+00:00").replace("T", " ")
        rows.append((time, event.action, ", ".join(experts), event.command))
        notes.append([f"  {key}: {value}" for key, value in others.items()])
    lines = zip(_table(rows).splitlines(), notes, strict=True)
    return "\n".join(line for first, more in lines for line in (first, *more))


def _statuses(event: "Event") -> list[str]:
    """The experts of an event by their status after it, such as "sv@v1 retired"; of many the
    first."""
    groups: dict[str, list[str]] = {}
    for reference, status in event.experts.items():
        if status or not event.renamed:  # a rename removes no expert
            groups.setdefault(status or "removed", []).append(reference)
    found = []
    for status, names in groups.items():
        left = len(names) - _NAMED_EXPERTS
        more = f" and {left} more" if left > 0 else ""
        found.append(f"{', '.join(names[:_NAMED_EXPERTS])}{more} {status}")
    return found


def removal(found: "Removal", *, done: bool) -> str:
    """What was deleted of an expert, or would be, and what remains, one line each."""
    if not found.versions:
        return f"{found.name} was removed already"
    verbs = (
        ("removed", "deleted", "remains") if done else ("to remove", "to delete", "would remain")
    )
    lines = [f"{verbs[0]}: {', '.join(found.versions)}"]
    for verb, some in zip(verbs[1:], (found.deleted, found.remains)):
        lines += [f"{verb}:", *(f"  {line}" for line in some)]
    return "\n".join(lines)


def pushed(done: "Pushed") -> str:
    """One line a file with its size, and what was done with it; last where they are."""
    if done.uploaded is None:
        state = dict.fromkeys(done.files, "")
    else:
        state = {file: "uploaded" if file in done.uploaded else "" for file in done.files}
    rows = [(name, f"{size:,}", state[name]) for name, size in done.files.items()]
    rows += [(name, "", "deleted") for name in done.deleted or ()]
    whole = f"{len(done.files)} files, {sum(done.files.values()) / 1e6:,.1f} MB"
    place = f"{done.repository}, {done.url}"
    last = f"{whole}, would be in {place}"
    if done.uploaded is not None:
        last = f"{whole}, are in {place}, commit {done.commit}"
        if not (done.uploaded or done.deleted):
            last += "; all of them were there already, and nothing was uploaded"
    return f"{_table([('file', 'bytes', ''), *rows], right=[1])}\n{last}"


def experts(found: "Sequence[ListedExpert]") -> str:
    """One line a version: name, status, parent, languages, tokens, size, and bits a byte on
    held-out text of the expert, its parent and the seed."""
    figures = ("expert", "parent", "seed")
    head = ("expert", "status", "parent", "languages", "tokens", "MB", *figures)
    rows: list[tuple[str, ...]] = [head]
    for each in found:
        bits = [f"{each.figures[name]:.3f}" if each.figures else "-" for name in figures]
        reference, size = f"{each.name}@v{each.version}", f"{each.bytes / 1e6:,.1f}"
        # An adopted expert was trained elsewhere, on nobody here knows how many.
        tokens = f"{each.tokens:,}" if each.tokens else "-"
        languages = " ".join(each.languages)
        rows.append((reference, each.status, each.parent, languages, tokens, size, *bits))
    note = "expert, parent, seed: bits a byte on held-out text, mean over the expert's languages"
    return f"{_table(rows, right=range(4, 9))}\n{note}"


def comparison(found: "Comparison") -> str:
    """One line for each fact in which two models differ, with the difference of numbers; details of
    the files of their text are only counted."""
    rows: list[tuple[str, ...]] = [("", found.first, found.second, "change")]
    shown = [each for each in found.differences if not _is_detail(each.name)]
    for each in shown:
        values = (each.first, each.second)
        change = ""
        if all(isinstance(value, int | float) for value in values):
            change = _number(each.second - each.first, "+")
        rows.append((each.name, *map(_value, values), change))
    if not found.differences:
        return f"{found.first} and {found.second} do not differ in anything that is recorded"
    table, left = _table(rows, right=(3,)), len(found.differences) - len(shown)
    return f"{table}\nand {left} details of their text, which --json has" if left else table


def _is_detail(name: str) -> bool:
    """Whether a fact is about single sources and hashes of the text of a model."""
    key = name.rpartition(".")[2]
    return name.startswith("data.") and (".sources." in name or key in ("text", "sha256"))


def _value(value: object) -> str:
    if isinstance(value, int | float):
        return _number(value)
    text = "-" if value is None or value == "" else str(value)
    if len(text) <= _VALUE:
        return text
    if "/" in text and " " not in text:
        return f"...{text[3 - _VALUE :]}"  # the end of a path says more
    return f"{text[:12]}..." if _HASH.fullmatch(text) else f"{text[: _VALUE - 3]}..."


def _number(value: float, sign: str = "") -> str:
    if isinstance(value, float):
        return f"{value:{sign}.3f}" if abs(value) >= 0.001 or not value else f"{value:{sign}.3g}"
    return f"{value:{sign},}"


def _table(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
    """Rows of cells, of which the first is the head, in columns as wide as they need. right:
    columns of which cells are at the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = [">" if column in right else "<" for column in range(len(widths))]
    return "\n".join(
        "  ".join(f"{cell:{s}{w}}" for cell, s, w in zip(row, sides, widths)).rstrip()
        for row in rows
    )


def _name(tag: str) -> str:
    return f"{tag:4} {english_name(tag)[:13]:13}"


def _line(name: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    """A name in 18 columns, and cells."""
    return (f"{name:18}" + _cells(cells, widths)).rstrip()


def _cells(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Cells at the right of columns of these widths."""
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))


def _pair(perplexity: float, bits_per_byte: float) -> str:
    # A column has room for five digits: text in a script that a model does not know takes more.
    shown = f"{perplexity:.1f}" if perplexity < 99_999.95 else f"{perplexity:.1e}"
    return f"{shown} {bits_per_byte:6.3f}"
