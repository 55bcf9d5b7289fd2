"""Figures of languages as points: on the map of the world, and in the plane by their distances.

Each draws on `ax`, or on a new figure, and returns the axes; none saves or shows.
"""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from clustering import geography, uriel
from clustering.distances import Distances
from clustering.errors import UserError
from clustering.figures import ABOVE, axes, cluster_colours, legend
from clustering.languages import english_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARGIN = 8.0
"""Margin of a map around the outermost languages, in degrees."""
_LEAST = 40.0
"""Least width and height of a map, in degrees."""
_ROOM_FOR_NAMES = 40
"""Number of languages up to which labels are names; above it they are codes."""
_LARGEST = 2.5
"""Largest factor by which a figure of many languages is wider and higher than usual."""
# Positions of a label, tried in turn: right of its point, left, above, below, then the corners. At
# the first distance (in points) it is next to its point; at the others a line connects them.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))
_DISTANCES = (6, 14, 24, 36, 50)
_LINE = {"arrowstyle": "-", "color": ABOVE, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
_SIDES = {1: "left", 0: "center", -1: "right"}
_HEIGHTS = {1: "bottom", 0: "center", -1: "top"}


def world_map(home: Mapping[str, str], names: Sequence[str], ax: "Axes | None" = None) -> "Axes":
    """Where the languages of each cluster are spoken, one point each, as URIEL has them.

    `home` maps each language to its cluster, `names` are all clusters. The title lists the
    languages that URIEL does not place. Coastlines are drawn if the package basemap is installed,
    which has them. UserError if no language has a place."""
    tags = uriel.known(list(home), "geo")
    if not tags:
        raise UserError("URIEL has no place for any of these languages")
    points = geography.coordinates(tags)[:, ::-1]
    west, east = _range(points[:, 0], -180.0, 180.0)
    south, north = _range(points[:, 1], -90.0, 90.0)
    height = 8.5 * (north - south) / (east - west)
    size = _scale(len(tags))
    ax = axes(ax, (2.5 + 8.5 * size, 1.0 + max(height, 3.0) * size))
    for line in _coastlines():
        ax.plot(*line.T, color=ABOVE, linewidth=0.5, zorder=0.5)
    ax.set_xlim(west, east)
    ax.set_ylim(south, north)
    ax.set_aspect("equal")
    _write_degrees(ax)
    notes = {"not on the map": [tag for tag in home if tag not in tags]}
    notes["without a label"] = _draw_points(ax, {tag: home[tag] for tag in tags}, names, points)
    _write_notes(ax, notes)
    return ax


def plane(
    distances: Distances, home: Mapping[str, str], names: Sequence[str], ax: "Axes | None" = None
) -> "Axes":
    """The languages as points of a plane whose distances are nearest to those given (classical
    scaling, Torgerson 1952); `home` and `names` as in `world_map`."""
    points, shown = scaled(distances.values)
    size = _scale(len(distances.languages))
    ax = axes(ax, (2.5 + 6.5 * size, 6.5 * size))
    ax.set_aspect("equal", adjustable="datalim")
    ax.margins(0.12)
    hidden = _draw_points(ax, home, names, points)
    _write_notes(ax, {"without a label": hidden})
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_color(ABOVE)
    ax.set_xlabel(f"distance: {distances.measure}; {shown:.0%} of it fits in the plane")
    return ax


def scaled(
    distances: Float[np.ndarray, "languages languages"],
) -> tuple[Float[np.ndarray, "languages 2"], float]:
    """Points in the plane whose distances are nearest to those given, and the share of the spread
    that they show, 0..1: the two largest eigenvalues of the centred squares over the sum of all
    that are above zero."""
    centred = distances**2 - (distances**2).mean(axis=0)
    centred = -0.5 * (centred - centred.mean(axis=1, keepdims=True))
    values, vectors = np.linalg.eigh(centred)
    values = np.maximum(values[::-1], 0.0)
    found = vectors[:, ::-1][:, :2] * np.sqrt(values[:2])
    points = np.pad(found, ((0, 0), (0, 2 - found.shape[1])))
    # The sign of an eigenvector is arbitrary and depends on the machine: the largest entry is made
    # positive.
    largest = np.abs(points).argmax(axis=0)
    points *= np.where(points[largest, [0, 1]] < 0, -1.0, 1.0)
    total = float(values.sum())
    return points, float(values[:2].sum()) / total if total else 1.0


def _draw_points(
    ax: "Axes",
    home: Mapping[str, str],
    names: Sequence[str],
    points: Float[np.ndarray, "languages 2"],
) -> list[str]:
    """Draws the points in the colours of their clusters; returns the languages for whose label
    there is no place."""
    colours, tags = cluster_colours(names), list(home)
    full = len(tags) <= _ROOM_FOR_NAMES
    style = {"s": 40, "linewidth": 1.5} if full else {"s": 16, "linewidth": 0.5}
    inks = [colours[name] for name in home.values()]
    ax.scatter(*points.T, c=inks, edgecolor="white", zorder=3, **style)
    legend(ax, colours)
    shown = _write_labels(ax, [english_name(tag) if full else tag for tag in tags], points)
    return [tag for tag, there in zip(tags, shown) if not there]


def _write_notes(ax: "Axes", notes: Mapping[str, Sequence[str]]) -> None:
    """Writes above the figure what it does not show, a line for each kind of note."""
    lines = [f"{what}: {', '.join(tags)}" for what, tags in notes.items() if tags]
    letters = round(110 * ax.figure.get_figure(root=True).get_figwidth() / 11)
    wrapped = [part for line in lines for part in textwrap.wrap(line, letters)]
    if wrapped:
        ax.set_title("\n".join(wrapped), fontsize="small", loc="left")


def _write_labels(
    ax: "Axes", labels: Sequence[str], points: Float[np.ndarray, "languages 2"]
) -> list[bool]:
    """Writes each label next to its point, or a little farther off at the end of a line, where no
    other label is; returns for each whether there was space."""
    from matplotlib.transforms import Bbox

    figure = ax.figure.get_figure(root=True)
    figure.draw_without_rendering()  # fixes the positions of the points
    spots = ax.transData.transform(points)
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in spots]
    frame, pixels = ax.get_window_extent(), figure.dpi / 72
    font = "small" if len(labels) <= _ROOM_FOR_NAMES else "x-small"
    shown = []
    for label, point, spot in zip(labels, points, spots):
        text = ax.annotate(label, point, fontsize=font)
        size = np.array(text.get_window_extent().size)
        text.remove()
        for distance, direction in itertools.product(_DISTANCES, _DIRECTIONS):
            offset, side = distance * np.array(direction), np.sign(direction)
            box = Bbox.from_bounds(*(spot + pixels * offset - size * (1 - side) / 2), *size)
            inside = frame.contains(*box.min) and frame.contains(*box.max)
            if inside and not box.count_overlaps(taken):
                break
        else:
            shown.append(False)
            continue
        taken.append(box)
        shown.append(True)
        ax.annotate(
            label,
            point,
            xytext=(float(offset[0]), float(offset[1])),
            textcoords="offset points",
            ha=_SIDES[int(side[0])],
            va=_HEIGHTS[int(side[1])],
            fontsize=font,
            arrowprops=None if distance == _DISTANCES[0] else _LINE,
        )
    return shown


def _scale(languages: int) -> float:
    """Factor by which a figure is larger than usual, so that its labels have space."""
    return min(max(languages / _ROOM_FOR_NAMES, 1.0) ** 0.5, _LARGEST)


def _range(values: np.ndarray, least: float, most: float) -> tuple[float, float]:
    """Range of an axis: all values with a margin, at least `_LEAST` wide, within the bounds."""
    low, high = float(values.min()) - _MARGIN, float(values.max()) + _MARGIN
    widen = max(_LEAST - (high - low), 0.0) / 2
    return max(low - widen, least), min(high + widen, most)


def _write_degrees(ax: "Axes") -> None:
    def degrees(sides: str):
        return lambda value, _: f"{abs(value):g}°{sides[int(value < 0)] if value else ''}"

    ax.xaxis.set_major_formatter(degrees("EW"))
    ax.yaxis.set_major_formatter(degrees("NS"))
    ax.grid(color=ABOVE, alpha=0.25, linewidth=0.5)
    ax.tick_params(length=0)
    ax.spines[:].set_color(ABOVE)


def _coastlines() -> list[Float[np.ndarray, "points 2"]]:
    try:
        from mpl_toolkits.basemap import Basemap  # pyright: ignore[reportMissingImports]
    except ImportError:
        return []
    corners = {"llcrnrlon": -180, "urcrnrlon": 180, "llcrnrlat": -90, "urcrnrlat": 90}
    world = Basemap(projection="cyl", resolution="c", **corners)
    return [np.column_stack(line) for line in world.coastpolygons]
