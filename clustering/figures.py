"""Figures of clusters: the tree, the distances, the sizes, and the languages of documents.

`Clustering` has a method for each. They take plain values, draw on `ax` or on a new figure, and
return the axes; none saves or shows. The palette is that of every figure of xelm. Numbers are
computed elsewhere.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from clustering import tree as trees
from clustering.distances import Distances
from clustering.languages import english_name
from clustering.tree import Merge

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Paul Tol's "muted" scheme (personal.sron.nl/~pault), made for colour blindness, in an order that
# keeps neighbours apart.
_PALETTE = (
    *("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE"),
    *("#AA4499", "#44AA99", "#882255", "#999933"),
)
ABOVE = "#888888"
"""Colour of joins above the clusters, and of anything in no cluster."""
_GAP = 0.02
"""Least distance between a join and those below it in a tree, as a share of the farthest join."""
_CROWDED = 60
"""Number of languages above which a figure is drawn smaller."""
_ROOM_FOR_NUMBERS = 20
"""Number of languages up to which a heat map shows numbers and horizontal labels."""
_INCHES_PER_LETTER = 0.08
"""Width of a letter of the default font, rounded up."""
_ROWS_PER_INCH = 4.0
"""Number of lines of a legend in an inch of height."""
_NARROWEST = 0.04
"""Share of a bar that is wide enough for a language code of three letters."""


def cluster_colours(names: Sequence[str]) -> dict[str, str]:
    """Cluster -> colour, `#rrggbb`, by position.

    After nine clusters the colours return darker, then lighter, so a figure needs names as well."""
    rounds = (_PALETTE, _mix(_PALETTE, 0, 0.4), _mix(_PALETTE, 255, 0.5))
    every = [colour for palette in rounds for colour in palette]
    return {name: every[index % len(every)] for index, name in enumerate(names)}


def dendrogram(
    home: Mapping[str, str],
    merges: Sequence[Merge],
    names: Sequence[str],
    method: str,
    ax: "Axes | None" = None,
) -> "Axes":
    """The tree from languages to one group, each cluster in its colour, joins above it in grey.

    `home` maps each language to its cluster, `names` are all clusters. A join is drawn a little
    farther out than those below it, even if its languages are closer: balance forces some distant
    pairs together early."""
    languages, colours = list(home), cluster_colours(names)
    line, size, area = (0.27, None, 36) if len(languages) <= _CROWDED else (0.13, 6.5, 12)
    ax = axes(ax, (7.0, 1.2 + line * len(languages)), size)
    leaf_colours = [colours[name] for name in home.values()]
    measured = [merge.distance for merge in merges]
    gap = _GAP * max(measured, default=0.0)
    tree = trees.linkage_matrix(languages, merges, gap=gap)
    order = _draw_tree(ax, tree, leaf_colours, len(colours))
    heights = np.arange(len(languages))
    points = [leaf_colours[leaf] for leaf in order]
    ax.scatter(np.zeros(len(order)), heights, s=area, c=points, zorder=3, clip_on=False)
    ax.set_yticks(heights, [_label(languages[leaf]) for leaf in order])
    ax.set_ylim(-0.6, len(languages) - 0.4)
    ax.set_xlim(left=0)
    ax.tick_params(axis="y", length=0, pad=8)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_xlabel(f"distance of what is joined: {method}")
    if len(tree) and np.any(tree[:, 2] > np.add(measured, 2 * gap)):
        ax.set_xlabel(f"{ax.get_xlabel()}\n(no join is drawn nearer than those below it)")
    legend(ax, colours)
    return ax


def distance_heatmap(
    distances: Distances,
    clusters: Mapping[str, Sequence[str]],
    merges: Sequence[Merge] | None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Distances between all languages, each cluster framed in its colour; in the order of the tree
    from above, or without `merges` in that of the clusters."""
    from matplotlib.patches import Rectangle

    ordered = _in_tree_order(distances.languages, clusters, merges)
    values = distances.of(ordered).values
    labels = [_label(language) for language in ordered]
    cell, size = (0.36, None) if len(ordered) <= _CROWDED else (0.1, 5.5)
    side = cell * len(ordered)
    words = _INCHES_PER_LETTER * (max(map(len, labels)) + max(map(len, clusters)))
    ax = axes(ax, (side + words + 1.2, side + 1.4), size)
    # Greys, since colours stand for clusters.
    image = ax.imshow(values, cmap="Greys", vmin=0.0)
    place = {"location": "bottom", "fraction": 0.035, "pad": 0.02}
    ax.figure.colorbar(image, ax=ax, label=f"distance: {distances.measure}", **place)
    if len(ordered) <= _ROOM_FOR_NUMBERS:
        _write_numbers(ax, values)
    colours = cluster_colours(tuple(clusters))
    for name, members in clusters.items():
        start, n = min(map(ordered.index, members)) - 0.5, len(members)
        frame = Rectangle((start, start), n, n, fill=False, edgecolor=colours[name], linewidth=3)
        ax.add_patch(frame).set_clip_on(False)
    rotation = 90 if len(ordered) > _ROOM_FOR_NUMBERS else 0
    ax.set_xticks(range(len(ordered)), ordered, rotation=rotation)
    ax.set_yticks(range(len(ordered)), labels)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    legend(ax, colours)
    return ax


def cluster_composition(
    documents: Mapping[str, Mapping[str, int]], ax: "Axes | None" = None
) -> "Axes":
    """Shares of the languages in each cluster of documents: a bar in its colour, the widest first.

    `documents` maps cluster and language to a number of documents. Languages too rare for a label
    in the bar are summed at its end, with their number as label."""
    shares, names = shares_of(documents), tuple(documents)
    ax = axes(ax, (8.0, 1.2 + 0.42 * len(names)))
    style = {"height": 0.76, "edgecolor": "white", "linewidth": 1.5}
    for row, (name, colour) in enumerate(cluster_colours(names).items()):
        start = 0.0
        for text, share in _pieces(shares[name]):
            ax.barh(row, share, left=start, color=colour, **style)
            ink = "black" if _brightness(colour) > 0.5 else "white"
            ax.text(start + share / 2, row, text, ha="center", va="center", color=ink, fontsize=8)
            start += share
    _set_bars(ax, [f"{name}  ({sum(documents[name].values()):,})" for name in names])
    ax.set_xlim(0, 1)
    ax.set_xticks(np.linspace(0, 1, 6), [f"{tick:.0%}" for tick in np.linspace(0, 1, 6)])
    ax.set_xlabel("share of the cluster's documents")
    ax.set_ylabel("cluster (documents)")
    return ax


def cluster_sizes(sizes: Mapping[str, int], unit: str, ax: "Axes | None" = None) -> "Axes":
    """A bar for each cluster's size, counted in `unit`; the mean as a line."""
    from matplotlib.ticker import MaxNLocator

    ax = axes(ax, (7.0, 1.2 + 0.3 * len(sizes)))
    colours = list(cluster_colours(tuple(sizes)).values())
    bars = ax.barh(range(len(sizes)), list(sizes.values()), color=colours)
    ax.bar_label(bars, [f"{size:,}" for size in sizes.values()], padding=3, fontsize="small")
    mean = float(np.mean(list(sizes.values())))
    ax.axvline(mean, color=ABOVE, linestyle="--", linewidth=1, zorder=0)
    _set_bars(ax, list(sizes))
    ax.margins(x=0.1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(f"{unit} of the cluster; dashed: the mean")
    return ax


def shares_of(documents: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, float]]:
    """Cluster -> language -> share of the cluster's documents, 0..1, from their numbers."""
    return {
        name: {language: count / sum(counts.values()) for language, count in counts.items()}
        for name, counts in documents.items()
    }


def _set_bars(ax: "Axes", labels: Sequence[str]) -> None:
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _draw_tree(ax: "Axes", tree: np.ndarray, leaf_colours: list[str], clusters: int) -> list[int]:
    """Draw the joins, leaf i at height i; return the leaves from the bottom up."""
    if len(tree) == 0:
        ax.set_xlim(0, 1)
        return [0]
    from matplotlib.collections import LineCollection
    from scipy.cluster import hierarchy

    leaves = len(tree) + 1
    colour_of = dict(enumerate(leaf_colours))
    for row, (side, *_) in enumerate(tree):
        # The first n-k joins made the clusters; those above them are grey.
        colour_of[leaves + row] = colour_of[int(side)] if row < leaves - clusters else ABOVE
    drawn = hierarchy.dendrogram(tree, no_plot=True, link_color_func=colour_of.__getitem__)
    # SciPy puts leaf i at 10 i + 5.
    lines = [
        np.column_stack([x, (np.array(y) - 5) / 10])
        for x, y in zip(drawn["dcoord"], drawn["icoord"], strict=True)
    ]
    ax.add_collection(LineCollection(lines, colors=drawn["color_list"], linewidths=2))
    ax.set_xlim(0, 1.05 * float(tree[:, 2].max()) or 1.0)
    return [int(leaf) for leaf in drawn["leaves"]]


def _in_tree_order(
    languages: Sequence[str], clusters: Mapping[str, Sequence[str]], merges: Sequence[Merge] | None
) -> list[str]:
    if not merges:
        return [language for members in clusters.values() for language in members]
    from scipy.cluster import hierarchy

    tree = trees.linkage_matrix(languages, merges)
    return [languages[int(leaf)] for leaf in hierarchy.leaves_list(tree)[::-1]]


def _write_numbers(ax: "Axes", values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        if row != column:
            ink = "white" if value > 0.55 * values.max() else "black"
            text = f"{value:.2f}".removeprefix("0")
            ax.text(column, row, text, ha="center", va="center", color=ink, fontsize=7)


def _pieces(shares: dict[str, float]) -> list[tuple[str, float]]:
    wide = [(tag, share) for tag, share in shares.items() if share >= _NARROWEST]
    rest = [share for share in shares.values() if share < _NARROWEST]
    total = sum(rest)
    text = f"+{len(rest)}" if total >= _NARROWEST else ""
    return wide + ([(text, total)] if rest else [])


def legend(ax: "Axes", colours: dict[str, str]) -> None:
    """Draws a legend of the clusters to the right of the axes, with enough columns to be no higher
    than the figure."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=name) for name, colour in colours.items()]
    rows = max(8, int(ax.figure.get_figure(root=True).get_figheight() * _ROWS_PER_INCH))
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "frameon": False}
    size = None if len(handles) <= rows else "small"
    columns = -(-len(handles) // rows)
    ax.legend(handles=handles, title="cluster", ncols=columns, fontsize=size, **place)


def axes(ax: "Axes | None", size: tuple[float, float], font_size: float | None = None) -> "Axes":
    """The given axes, or those of a new figure of this size in inches and font size of ticks."""
    if ax is not None:
        return ax
    from matplotlib import pyplot

    ax = pyplot.subplots(figsize=size, layout="constrained")[1]
    if font_size is not None:
        ax.tick_params(labelsize=font_size)
    return ax


def _label(tag: str) -> str:
    return f"{english_name(tag)} ({tag})"


def _brightness(colour: str) -> float:
    """Perceived brightness of `#rrggbb`, 0..1 (ITU-R BT.601 weights)."""
    return float(np.dot([0.299, 0.587, 0.114], list(bytes.fromhex(colour[1:])))) / 255


def _mix(colours: Sequence[str], other: int, share: float) -> list[str]:
    """The colours `#rrggbb` with a share of a grey, 0..255."""
    channels = [bytes.fromhex(colour[1:]) for colour in colours]
    mixed = [bytes(round((1 - share) * c + share * other) for c in three) for three in channels]
    return [f"#{three.hex()}" for three in mixed]
