"""Plots of losses, and of experts on every language. Each takes data and `ax`, or makes a figure
of its own, and returns the axes; none saves or shows. `clustering.figures` has the others."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from xelm.evaluation.report.words import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#222222"
LEGEND_COLUMNS = 2
ROOM_FOR_NUMBERS = 20
"""Number of languages up to which a heat map shows numbers."""
_LONGEST_LABEL = 28
_STEPS = (1.1, 1.25, 1.5, 2.0, 3.0, 4.0)
"""Ratios of perplexities, and their inverses, at which the colours of a heat map can end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Loss curve of one training."""

    label: str
    """Name of the system."""
    tokens: Sequence[float]
    """Number of tokens seen at each point."""
    losses: Sequence[float]
    """Loss at each point, in nats per token; NaN leaves a gap."""
    held_out: Sequence[tuple[float, float]] = ()
    """Tokens and loss of each measurement on held-out text."""
    colour: str
    """Colour as `#rrggbb`."""
    dashed: bool = False
    """Whether the line is dashed, to distinguish curves of the same colour."""


def new_axes(size: tuple[float, float] | None = None) -> "Axes":
    """Axes on a figure of their own, of this width and height in inches; made without pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots()


def loss_curves(curves: Sequence[Curve], ax: "Axes | None" = None) -> "Axes":
    """Training losses against tokens, and circles for losses on held-out text, with a legend
    below."""
    from matplotlib.colors import to_hex, to_rgb
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter

    ax = ax or new_axes()
    for curve in curves:
        (line,) = ax.plot(curve.tokens, curve.losses, color=curve.colour, linewidth=1.8)
        line.set(label=_shortened(curve.label), marker="o" if len(curve.tokens) == 1 else "")
        if curve.dashed:
            line.set_linestyle((0, (4, 1.5)))
        else:
            # A darker edge lets the pale colours of the palette stand out from white.
            red, green, blue = (0.65 * part for part in to_rgb(curve.colour))
            edge = withStroke(linewidth=3, foreground=to_hex((red, green, blue)))
            line.set_path_effects([edge])
        circles = {"s": 14, "facecolors": "white", "edgecolors": curve.colour, "zorder": 3}
        if curve.held_out:
            ax.scatter(*zip(*curve.held_out), **circles)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    ax.set_xlim(left=0)
    ax.set(xlabel="tokens seen in this training", ylabel="loss (nats per predicted token)")
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        below = {"loc": "upper left", "bbox_to_anchor": (0.0, -0.16), "borderaxespad": 0.0}
        ax.legend(ncols=LEGEND_COLUMNS, frameon=False, **below)
    return ax


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
    expert -> its languages, which are framed. Not-a-number is left grey."""
    from matplotlib.patches import Rectangle

    ax = ax or new_axes()
    logs = np.log(ratios)
    largest = np.exp(np.nanmax(np.abs(logs), initial=0.0))
    farthest = next((step for step in _STEPS if largest <= step), _STEPS[-1])
    limit, has_room = np.log(farthest), len(languages) <= ROOM_FOR_NUMBERS
    image = ax.imshow(logs, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", zorder=1)
    if has_room:
        for (row, column), ratio in np.ndenumerate(ratios):
            if np.isfinite(ratio):
                ink = "white" if abs(np.log(ratio)) > 0.6 * limit else INK
                text = _percent(ratio)
                ax.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)
    framed = [[tag in own.get(expert, ()) for tag in languages] for expert in experts]
    for row, column in np.argwhere(framed):
        box = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=INK, zorder=3)
        ax.add_patch(box).set(linewidth=2.2 if has_room else 1.2, clip_on=False)
    _cluster_bars(ax, experts.values(), along_rows=True)
    _cluster_bars(ax, languages.values(), along_rows=False)
    upright = has_room and all(len(tag) <= 4 for tag in languages)
    ax.set_xticks(range(len(languages)), list(languages), rotation=0 if upright else 90)
    ax.set_yticks(range(len(experts)), [_shortened(name) for name in experts])
    ax.tick_params(length=0, pad=9)
    ax.set(facecolor="#cccccc", xlabel="language of the text", ylabel="expert")
    ax.spines[:].set_visible(False)
    _ratio_scale(ax, image, farthest, ratios)
    return ax


def _cluster_bars(ax: "Axes", colours: Collection[str], *, along_rows: bool) -> None:
    """Bars in the clusters' colours between the cells and the names of rows or columns."""
    from matplotlib.transforms import ScaledTranslation

    ax.set_autoscale_on(False)
    axis = ax.get_yaxis_transform() if along_rows else ax.get_xaxis_transform()
    away = (-5 / 72, 0) if along_rows else (0, -5 / 72)
    place = axis + ScaledTranslation(*away, ax.figure.dpi_scale_trans)
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


def _ratio_scale(ax: "Axes", image: Any, farthest: float, ratios: np.ndarray) -> None:
    # Halfway in ratio, so that the ticks are evenly apart.
    marks = [1 / farthest, farthest**-0.5, 1.0, farthest**0.5, farthest]
    texts = ["same as\nthe seed" if mark == 1 else f"{_percent(mark)} %" for mark in marks]
    below, above = (ratios < 1 / farthest).any(), (ratios > farthest).any()
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    shrink = min(0.7, 4.5 / ax.figure.get_figure(root=True).get_figwidth())
    bar = ax.figure.colorbar(
        image, ax=ax, location="bottom", extend=extend, shrink=shrink, aspect=30, pad=0.03
    )
    bar.set_ticks(list(np.log(marks)), labels=texts)
    bar.set_label("perplexity against the seed (blue: better, red: worse)")
    bar.outline.set_visible(False)  # type: ignore[operator]


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"


def _percent(ratio: float) -> str:
    """A ratio as a change in whole percent, or as a factor where that says more: −34, ×12."""
    if ratio >= 10:
        return f"×{ratio:.0f}" if ratio < 1000 else ">×999"
    change = round(100 * (ratio - 1))
    return f"{change:+d}".replace("-", "−") if change else "0"
