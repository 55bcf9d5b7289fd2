"""The page and the figures as files: fills report.html.j2 with what the other modules found, and
draws with matplotlib, never with pyplot, whose state is global. Equal data give equal bytes."""

import csv
import io
import re
import warnings
from pathlib import Path
from typing import Any

from clustering.files import replace
from xelm.evaluation.report import tables
from xelm.evaluation.report.facts import Facts
from xelm.evaluation.report.figures import INK, new_axes
from xelm.evaluation.report.missing import Missing, missing
from xelm.evaluation.report.pictures import Picture, pictures
from xelm.evaluation.report.verdict import compare, verdict
from xelm.evaluation.report.words import language_name, named, perplexity, signed

_PIXELS_PER_INCH = 160
_MOST_PIXELS = 4000
"""Largest number of pixels along the longer side of a PNG."""
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
    "svg.hashsalt": "xelm",
    "text.parse_math": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": "#666666",
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.08,
}

PAGE = "report.html"
"""Name of the page."""
FIGURES = "figures"
"""Folder of its figures, beside it."""


def write_report(facts: Facts, directory: Path) -> Path:
    """Writes report.html and figures into a directory; returns the page's path."""
    found, drawn = pictures(facts), {}
    for name, picture in found.items():
        path = directory / FIGURES / f"{name}.svg"
        if isinstance(picture, Missing):
            for ending in ("svg", "png", "csv"):  # of a report before the RUN changed
                path.with_suffix(f".{ending}").unlink(missing_ok=True)
        else:
            made = files(picture)
            for ending, content in made.items():
                _write(path.with_suffix(f".{ending}"), content)
            drawn[name] = inline(made["svg"], name)
    path = directory / PAGE
    _write(path, _page(facts, found, drawn).encode())
    return path


def _page(facts: Facts, found: dict[str, Picture | Missing], drawn: dict[str, str]) -> str:
    """The page as HTML. found: name -> figure, or why there is none. drawn: name -> SVG."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.loader = jinja2.PackageLoader("xelm.evaluation.report", "")
    environment.filters |= {f.__name__: f for f in (language_name, named, perplexity, signed)}
    comparison = compare(facts)
    return environment.get_template("report.html.j2").render(
        facts=facts,
        comparison=comparison,
        sizes=tables.sizes(facts),
        verdict=verdict(facts, comparison),
        missing=missing(facts),
        languages=tables.language_table(facts, comparison),
        texts=tables.text_table(facts),
        certainty=tables.certainty_table(facts),
        clusters=tables.cluster_table(facts, comparison),
        experts=tables.expert_table(facts),
        pictures=found,
        drawn=drawn,
        making=tables.making(facts),
        hashes=tables.hashes(facts),
        configuration=list(tables.settings(facts.record.get("config", {}))),
    )


def files(picture: Picture) -> dict[str, bytes]:
    """A picture as "svg" and "png", its numbers as "csv"; equal data give equal bytes."""
    import matplotlib

    dpi = min(_PIXELS_PER_INCH, _MOST_PIXELS / max(picture.size))
    style = {**_STYLE, "font.size": picture.font_size, "savefig.dpi": dpi}
    undated = {"svg": ("Date", "Creator", "Format", "Type"), "png": ("Software",)}
    made = {}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # A cluster named in a script that the font lacks is drawn as boxes; the page has its name.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        ax = new_axes(picture.size)
        picture.draw(ax)
        figure = ax.figure.get_figure(root=True)
        for kind, fields in undated.items():
            file = io.BytesIO()
            figure.savefig(file, format=kind, metadata=dict.fromkeys(fields))
            made[kind] = file.getvalue()
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([picture.columns, *picture.rows])
    return made | {"csv": table.getvalue().encode()}


def inline(svg: bytes, prefix: str) -> str:
    """An SVG of `files` as an element of a page: its ids begin with `prefix`, so that several
    pictures of one page do not share any, and its width follows that of the page."""
    text = svg.decode()
    head, body = text[text.index("<svg") :].split(">", 1)
    width = float(re.search(r'width="([\d.]+)pt"', head)[1]) * 96 / 72  # type: ignore[index]
    head = re.sub(r' (?:width|height|version)="[^"]*"', "", head)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'(href="|url\()#', rf"\g<1>#{prefix}-", body)
    return f'{head} style="--width:{width:.0f}px" aria-hidden="true">{body}'


def _write(path: Path, content: bytes) -> None:
    replace(path, lambda file: file.write(content))
