"""The figures of a report: what each shows, in numbers and in words, and how it is drawn.

`tree`, `distances`, `composition`, `losses` and `experts_by_language` make a `Picture`, `files` its
bytes. The plots take data and `ax`, draw and return the axes; those of clusterings are
`clustering.figures`, whose palette all share. Imports matplotlib when something is drawn, and never
pyplot, whose state is global. Writes nothing.
"""

import csv
import io
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from clustering import figures as clustering_figures
from clustering.clustering import Clustering
from clustering.languages import english_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Size = tuple[float, float]
"""Width and height in inches."""

_INK = "#222222"
_PIXELS_PER_INCH = 160
_MOST_PIXELS = 4000
"""Along the longer side of a PNG."""
_CROWDED = 60
"""Languages from which on a tree and the distances are drawn smaller."""
_LEGEND_COLUMNS = 2
_LONGEST_LABEL = 28
_INCHES_PER_LETTER = 0.08
_ROOM_FOR_NUMBERS = 20
"""Languages up to which the heat map shows figures."""
_FARTHEST = 4.0
"""Ratio of perplexities from which on the colours of the heat map are at their end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A figure and the numbers it shows."""

    title: str
    alt: str
    """What it shows, for who cannot see it."""
    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    """The numbers, under `columns`."""
    draw: Callable[["Axes"], object]
    size: Size
    font_size: float = 9.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One training."""

    label: str
    """Name of the system."""
    tokens: Sequence[float]
    """Seen so far in this training."""
    losses: Sequence[float]
    """Nats a token; not-a-number leaves a gap."""
    colour: str
    """`#rrggbb`."""
    dashed: bool = False
    """To tell it from another curve of the same colour."""


def tree(clusters: Clustering) -> Picture:
    """How the languages were joined; for clusters that have a tree."""
    merges, count = clusters.merges or (), len(clusters.languages)
    words = max(len(english_name(t)) for t in clusters.languages) + max(map(len, clusters.clusters))
    alt = f"Tree of {plural(count, 'language')} in {plural(len(clusters.clusters), 'cluster')}."
    if merges:
        closest = min(merges, key=lambda merge: merge.distance)
        joined = (" ".join(map(english_name, side)) for side in closest[:2])
        alt += f" Joined first: {' with '.join(joined)}, at distance {closest.distance:.2f}."
    return Picture(
        title="How the languages were joined",
        alt=alt,
        caption="Languages joined farther left are more alike; grey joins lie above the clusters.",
        columns=("members_a", "members_b", "distance"),
        rows=[(" ".join(m.members_a), " ".join(m.members_b), m.distance) for m in merges],
        draw=lambda ax: clustering_figures.dendrogram(clusters, ax),
        size=(
            5.0 + _INCHES_PER_LETTER * words,
            1.2 + (0.27 if count <= _CROWDED else 0.17) * count,
        ),
        font_size=9.5 if count <= _CROWDED else 8,
    )


def distances(clusters: Clustering) -> Picture:
    """How far apart the languages are; for clusters that have distances."""
    tags, values = clusters.languages, np.asarray(clusters.distances)
    pairs = [(i, j) for i in range(len(tags)) for j in range(i)]
    found = [float(values[pair]) for pair in pairs]
    side = (0.36 if len(tags) <= _ROOM_FOR_NUMBERS else 0.17) * len(tags)
    return Picture(
        title="How far apart the languages are",
        alt=f"Heat map of the distances between {plural(len(tags), 'language')}, in the order of "
        "the clusters" + (f": from {min(found):.2f} to {max(found):.2f}." if found else "."),
        caption="Dark is far. Each cluster is framed in its colour.",
        columns=("language_a", "language_b", "distance"),
        rows=[(tags[i], tags[j], value) for (i, j), value in zip(pairs, found)],
        draw=lambda ax: clustering_figures.distance_heatmap(clusters, ax),
        size=(side + 3.6, side + 1.4),
        font_size=9.5 if len(tags) <= _CROWDED else 8,
    )


def composition(clusters: Clustering) -> Picture:
    """What clusters of documents hold."""
    documents, shares = clusters.documents or {}, clusters.shares or {}
    mostly = (f"{name} mostly {max(part, key=part.__getitem__)}" for name, part in shares.items())
    return Picture(
        title="What the clusters hold",
        alt=f"Bars with the languages of each cluster's documents: {', '.join(mostly)}.",
        caption="Documents were clustered by their words, so a language can be in several.",
        columns=("cluster", "language", "documents", "share"),
        rows=[
            (name, tag, documents[name][tag], share)
            for name, part in shares.items()
            for tag, share in part.items()
        ],
        draw=lambda ax: clustering_figures.cluster_composition(clusters, ax),
        size=(8.0, 1.2 + 0.42 * len(documents)),
    )


def losses(curves: Sequence[Curve], title: str, caption: str) -> Picture:
    """How trainings went."""
    ends = (f"{c.label} from {c.losses[0]:.2f} to {c.losses[-1]:.2f}" for c in curves)
    return Picture(
        title=title,
        alt=f"Curves of the loss in nats per token against tokens: {', '.join(ends)}.",
        caption=caption,
        columns=("system", "tokens", "loss"),
        rows=[(c.label, *point) for c in curves for point in zip(c.tokens, c.losses)],
        draw=lambda ax: loss_curves(curves, ax),
        size=loss_size(len(curves)),
    )


def experts_by_language(
    perplexities: Mapping[str, Mapping[str, float]],
    seed: Mapping[str, float],
    experts: Mapping[str, str],
    languages: Mapping[str, str],
    own: Mapping[str, Collection[str]],
) -> Picture:
    """Every expert on every language, against the seed; arguments as in `expert_heatmap`.

    perplexities: expert -> language -> perplexity. seed: language -> perplexity.
    """
    cells = [[perplexities[e].get(tag, np.nan) / seed[tag] for tag in languages] for e in experts]
    ratios = np.array(cells)
    served = [tag for tag in languages if any(tag in own[expert] for expert in experts)]
    best = {tag: min(experts, key=lambda e: perplexities[e].get(tag, np.inf)) for tag in served}
    wins = sum(tag in own[expert] for tag, expert in best.items())
    found = (
        f"In {wins} of {plural(len(served), 'language')} that an expert learned, that expert "
        "is the best of all."
    )
    return Picture(
        title="Every expert on every language",
        alt=f"Heat map of {plural(len(experts), 'expert')} by "
        f"{plural(len(languages), 'language')}: perplexity against the seed. {found}",
        caption="Change of perplexity against the seed, in percent or as a factor (×); an expert's "
        f"own languages are framed. {found}",
        columns=("expert", "language", "perplexity", "seed_perplexity", "ratio"),
        rows=[
            (e, tag, perplexities[e][tag], seed[tag], perplexities[e][tag] / seed[tag])
            for e in experts
            for tag in languages
            if tag in perplexities[e]
        ],
        draw=lambda ax: expert_heatmap(ratios, experts, languages, own, ax),
        size=heatmap_size(len(experts), tuple(languages)),
    )


def loss_curves(curves: Sequence[Curve], ax: "Axes | None" = None) -> "Axes":
    """Training losses against tokens, with a legend below."""
    from matplotlib import patheffects
    from matplotlib.ticker import FuncFormatter

    ax = ax or new_axes(loss_size(len(curves)))
    for curve in curves:
        # A darker edge lets the pale colours of the palette stand out from white.
        edge = patheffects.Stroke(linewidth=3, foreground=_darker(curve.colour))
        ax.plot(
            curve.tokens,
            curve.losses,
            label=shortened(curve.label),
            color=curve.colour,
            linewidth=1.8,
            linestyle=(0, (4, 1.5)) if curve.dashed else "solid",
            marker="o" if len(curve.tokens) == 1 else None,
            path_effects=None if curve.dashed else [edge, patheffects.Normal()],
        )
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    ax.set_xlim(left=0)
    ax.set_xlabel("tokens seen in this training")
    ax.set_ylabel("loss (nats per token)")
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        ax.legend(
            loc="upper left",
            bbox_to_anchor=(0.0, -0.16),
            ncols=_LEGEND_COLUMNS,
            frameon=False,
            borderaxespad=0.0,
        )
    return ax


def loss_size(curves: int) -> Size:
    """Room for the axes and as many lines of legend as the curves take."""
    return 5.2, 3.5 + 0.2 * -(-curves // _LEGEND_COLUMNS)


def expert_heatmap(
    ratios: Float[np.ndarray, "E languages"],
    experts: Mapping[str, str],
    languages: Mapping[str, str],
    own: Mapping[str, Collection[str]],
    ax: "Axes | None" = None,
) -> "Axes":
    """Perplexity of each expert on each language as a ratio to the seed's, on a logarithmic scale
    centred at "same as the seed": blue is better, red is worse.

    experts and languages: name -> colour of the cluster, in the order of rows and columns. own:
    expert -> its languages, which are framed. Not-a-number is left grey.
    """
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    ax = ax or new_axes(heatmap_size(len(experts), tuple(languages)))
    farthest = _farthest(ratios)
    limit = float(np.log(farthest))
    ax.set_facecolor("#cccccc")
    image = ax.imshow(
        np.log(ratios), cmap="RdBu_r", norm=Normalize(-limit, limit), aspect="auto", zorder=1
    )
    with_numbers = len(languages) <= _ROOM_FOR_NUMBERS
    if with_numbers:
        _write_changes(ax, ratios, limit)
    for row, expert in enumerate(experts):
        for column, language in enumerate(languages):
            if language in own.get(expert, ()):
                box = Rectangle(
                    (column - 0.5, row - 0.5),
                    1,
                    1,
                    fill=False,
                    linewidth=2.2 if with_numbers else 1.2,
                )
                box.set(edgecolor=_INK, zorder=3, clip_on=False)
                ax.add_patch(box)
    ax.set_autoscale_on(False)
    _cluster_bars(ax, list(experts.values()), along_rows=True)
    _cluster_bars(ax, list(languages.values()), along_rows=False)
    upright = with_numbers and all(len(tag) <= 4 for tag in languages)
    ax.set_xticks(range(len(languages)), list(languages), rotation=0 if upright else 90)
    ax.set_yticks(range(len(experts)), [shortened(name) for name in experts])
    ax.tick_params(length=0, pad=9)
    ax.set_xlabel("language of the text")
    ax.set_ylabel("expert")
    ax.spines[:].set_visible(False)
    _ratio_scale(ax, image, farthest, ratios)
    return ax


def heatmap_size(experts: int, languages: Sequence[str]) -> Size:
    """Room for a number in each cell where there are few languages, else for the codes alone."""
    cell = 0.44 if len(languages) <= _ROOM_FOR_NUMBERS else 0.19
    return max(5.0, 2.4 + cell * len(languages)), 1.9 + 0.34 * experts


def new_axes(size: Size) -> "Axes":
    """Axes on a figure of their own."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots()


def files(picture: Picture) -> dict[str, bytes]:
    """A picture as "svg" and "png", its numbers as "csv"; equal data give equal bytes."""
    import matplotlib

    settings: dict[Any, Any] = {
        "font.size": picture.font_size,
        "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
        "svg.hashsalt": "xelm",
        "text.parse_math": False,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.edgecolor": "#666666",
    }
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    made = {"svg": io.BytesIO(), "png": io.BytesIO()}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A cluster named in a script that the font lacks is drawn as boxes; the page has its name.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        ax = new_axes(picture.size)
        picture.draw(ax)
        figure = ax.get_figure(root=True)
        assert figure is not None
        for kind, file in made.items():
            figure.savefig(
                file,
                format=kind,
                dpi=min(_PIXELS_PER_INCH, _MOST_PIXELS / max(picture.size)),
                bbox_inches="tight",
                pad_inches=0.08,
                metadata=nothing if kind == "svg" else {"Software": None},
            )
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([picture.columns, *picture.rows])
    return {kind: file.getvalue() for kind, file in made.items()} | {
        "csv": table.getvalue().encode()
    }


def inline(svg: bytes, prefix: str) -> str:
    """An SVG of `files` as an element of a page: its ids begin with `prefix`, so that several
    pictures of one page do not share any, and its width follows that of the page."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="|url\()#', rf"\g<1>#{prefix}-", text)
    width = float(re.search(r'width="([\d.]+)pt"', text)[1]) * 96 / 72  # type: ignore[index]
    style = f'style="--width:{width:.0f}px" aria-hidden="true"'
    head = re.sub(r' (?:width|height|version)="[^"]*"', "", text[: text.index(">")])
    return f"{head} {style}{text[text.index('>') :]}"


def count(number: float) -> str:
    """A number of tokens or parameters for people: 950, 590 k, 1.2 M, 3 B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"


def shortened(name: str) -> str:
    """A name that leaves room for the picture."""
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"


def percent(ratio: float) -> str:
    """A ratio as a change in whole percent, or as a factor where that says more: −34, ×12."""
    if ratio >= 10:
        return f"×{ratio:.0f}" if ratio < 1000 else ">×999"
    change = round(100 * (ratio - 1))
    return f"{change:+d}".replace("-", "−") if change else "0"


def plural(number: int, word: str) -> str:
    """1 language, 2 languages."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _farthest(ratios: np.ndarray) -> float:
    """The ratio at the end of the colour scale, a round number."""
    with np.errstate(all="ignore"):
        distances = np.exp(np.abs(np.log(ratios)))
    largest = float(np.nanmax(distances, initial=1.0))
    return next((step for step in (1.1, 1.25, 1.5, 2.0, 3.0) if largest <= step), _FARTHEST)


def _ratio_scale(ax: "Axes", image: Any, farthest: float, ratios: np.ndarray) -> None:
    # Halfway in ratio, so that the ticks are evenly apart.
    marks = [1 / farthest, farthest**-0.5, 1.0, farthest**0.5, farthest]
    texts = ["same as\nthe seed" if mark == 1 else f"{percent(mark)} %" for mark in marks]
    below, above = bool((ratios < 1 / farthest).any()), bool((ratios > farthest).any())
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    bar = ax.figure.colorbar(
        image,
        ax=ax,
        location="bottom",
        ticks=list(np.log(marks)),
        extend=extend,
        shrink=min(0.7, 4.5 / ax.figure.get_figure(root=True).get_figwidth()),
        aspect=30,
        pad=0.03,
    )
    bar.ax.set_xticklabels(texts)
    bar.set_label("perplexity against the seed (blue: better, red: worse)")
    bar.outline.set_visible(False)  # type: ignore[operator]


def _write_changes(ax: "Axes", ratios: np.ndarray, limit: float) -> None:
    for (row, column), ratio in np.ndenumerate(ratios):
        if np.isfinite(ratio):
            ink = "white" if abs(np.log(ratio)) > 0.6 * limit else _INK
            ax.text(column, row, percent(ratio), ha="center", va="center", color=ink, fontsize=8)


def _cluster_bars(ax: "Axes", colours: Sequence[str], *, along_rows: bool) -> None:
    """Bars in the clusters' colours between the cells and the names of rows or columns."""
    from matplotlib.transforms import ScaledTranslation

    away = -5 / 72
    inches = ax.figure.dpi_scale_trans
    if along_rows:
        place = ax.get_yaxis_transform() + ScaledTranslation(away, 0, inches)
    else:
        place = ax.get_xaxis_transform() + ScaledTranslation(0, away, inches)
    for position, colour in enumerate(colours):
        span, edge = (position - 0.44, position + 0.44), (0, 0)
        ax.plot(
            *((edge, span) if along_rows else (span, edge)),
            transform=place,
            color=colour,
            linewidth=5,
            solid_capstyle="butt",
            clip_on=False,
        )


def _darker(colour: str) -> str:
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(0.65 * part):02x}" for part in parts)
