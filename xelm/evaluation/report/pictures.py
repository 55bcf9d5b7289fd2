"""Figures of a RUN: the data, the caption and the description of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from clustering import geography, maps, uriel
from clustering.clustering import Clustering
from clustering.distances import Distances
from clustering.languages import english_name
from xelm.evaluation.report import figures
from xelm.evaluation.report.facts import Facts
from xelm.evaluation.report.figures import INK, LEGEND_COLUMNS, ROOM_FOR_NUMBERS, Curve
from xelm.evaluation.report.missing import Missing
from xelm.evaluation.report.words import plural
from xelm.evaluation.results import DENSE, SEED, System

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CROWDED = 60
"""Number of languages above which a tree and the distances are drawn smaller."""
_INCHES_PER_LETTER = 0.08
_MOST_POINTS = 400
"""Largest number of points of a curve."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A figure with the numbers that it shows."""

    title: str
    alt: str
    """Description for readers who cannot see the figure."""
    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    """Rows of numbers under `columns`."""
    draw: Callable[["Axes"], object]
    size: tuple[float, float]
    """Width and height of the figure in inches."""
    font_size: float = 9.5


def pictures(facts: Facts) -> dict[str, Picture | Missing]:
    """Every figure by the name of its file, or the reason why there is none."""
    clusters = facts.clusters
    tree = distances = composition = places = plane = Missing("")
    if clusters and clusters.of_documents:
        composition = _composition(clusters)
    elif clusters:
        none = Missing(f"Clusters made by {clusters.method!r} have neither a tree nor distances.")
        tree = none if clusters.merges is None else _tree(clusters)
        if clusters.distances is not None:
            distances, plane = _distances(clusters), _plane(clusters, clusters.distances)
        places = _map(clusters)
    seed = _curve(facts, SEED, SEED.name, INK)
    given = facts.record.get("seed_from") is not None
    unknown = "" if given else "The training of the seed is not recorded here."
    return {
        "tree": tree,
        "distances": distances,
        "map": places,
        "plane": plane,
        "composition": composition,
        "loss-seed": _losses([seed], "Training of the seed", "Smaller is better.", unknown),
        "loss-experts": _expert_losses(facts),
        "experts-by-language": _experts_by_language(facts),
    }


def _tree(clusters: Clustering) -> Picture:
    merges, count = clusters.merges or (), len(clusters.languages)
    words = max(len(english_name(t)) for t in clusters.languages) + max(map(len, clusters.clusters))
    line, font_size = (0.27, 9.5) if count <= _CROWDED else (0.17, 8)
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
        draw=clusters.plot_tree,
        size=(5.0 + _INCHES_PER_LETTER * words, 1.2 + line * count),
        font_size=font_size,
    )


def _distances(clusters: Clustering) -> Picture:
    assert clusters.distances is not None
    tags, values = clusters.languages, clusters.distances.values
    rows = [(tags[i], tags[j], float(values[i, j])) for i in range(len(tags)) for j in range(i)]
    found = [distance for *_, distance in rows]
    side = (0.36 if len(tags) <= ROOM_FOR_NUMBERS else 0.17) * len(tags)
    return Picture(
        title="How far apart the languages are",
        alt=f"Heat map of the distances between {plural(len(tags), 'language')}, in the order of "
        "the clusters" + (f": from {min(found):.2f} to {max(found):.2f}." if found else "."),
        caption="Dark is far. Each cluster is framed in its colour.",
        columns=("language_a", "language_b", "distance"),
        rows=rows,
        draw=clusters.plot_distances,
        size=(side + 3.6, side + 1.4),
        font_size=9.5 if len(tags) <= _CROWDED else 8,
    )


def _map(clusters: Clustering) -> Picture | Missing:
    tags = uriel.known(clusters.languages, "geo")
    if not tags:
        return Missing("")
    places = geography.coordinates(tags)
    return Picture(
        title="Where the languages are spoken",
        alt=f"Map with a point for each of {plural(len(tags), 'language')}, in its cluster's "
        f"colour, from {places[:, 0].min():.0f} to {places[:, 0].max():.0f} degrees north.",
        caption="One point for each language, as URIEL has them; many are spoken elsewhere too.",
        columns=("language", "cluster", "latitude", "longitude"),
        rows=[
            (tag, clusters.cluster_of(tag), round(float(north), 2), round(float(east), 2))
            for tag, (north, east) in zip(tags, places)
        ],
        draw=clusters.plot_map,
        size=(9.0, 4.5),
    )


def _plane(clusters: Clustering, distances: Distances) -> Picture:
    points, shown = maps.scaled(distances.values)
    return Picture(
        title="Near and far in a plane",
        alt=f"{plural(len(points), 'language')} as points whose distances are as near to those "
        "measured as a plane allows.",
        caption=f"The plane shows {shown:.0%} of what tells the languages apart; the rest lies "
        "behind it.",
        columns=("language", "x", "y"),
        rows=[(t, float(x), float(y)) for t, (x, y) in zip(distances.languages, points)],
        draw=clusters.plot_plane,
        size=(8.0, 5.5),
    )


def _composition(clusters: Clustering) -> Picture:
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
        draw=clusters.plot_composition,
        size=(8.0, 1.2 + 0.42 * len(documents)),
    )


def _expert_losses(facts: Facts) -> Picture | Missing:
    waiting = " (in training)"
    label = DENSE.name + ("" if facts.has_dense else waiting)
    curves = [_curve(facts, DENSE, label, INK, dashed=True)]
    for expert in facts.experts:
        label = expert.name + ("" if expert.status == "published" else waiting)
        curves.append(_curve(facts, System(expert.name), label, facts.colour(expert)))
    return _losses(
        curves,
        "Training of the experts" + (" and of dense" if facts.metrics[DENSE] else ""),
        "Each starts from the seed, or from its parent if it was grown. They read different "
        "languages, so slopes can be compared, heights cannot.",
        "No expert has been trained yet.",
    )


def _losses(curves: Sequence[Curve], title: str, caption: str, otherwise: str) -> Picture | Missing:
    """The loss curves of trainings, or the sentence to show without any."""
    curves = [curve for curve in curves if curve.tokens]
    if not curves:
        return Missing(otherwise)
    ends = (f"{c.label} from {c.losses[0]:.2f} to {c.losses[-1]:.2f}" for c in curves)
    if any(curve.held_out for curve in curves):
        caption += " Circles are of held-out text; an expert has the weights of its lowest."
    points = [(c.label, "training", *point) for c in curves for point in zip(c.tokens, c.losses)]
    points += [(c.label, "held-out", *point) for c in curves for point in c.held_out]
    return Picture(
        title=title,
        alt=f"Curves of the loss in nats per predicted token against tokens: {', '.join(ends)}.",
        caption=caption,
        columns=("system", "text", "tokens", "loss"),
        rows=points,
        draw=partial(figures.loss_curves, curves),
        size=(5.2, 3.5 + 0.2 * -(-len(curves) // LEGEND_COLUMNS)),
    )


def _curve(facts: Facts, system: System, label: str, colour: str, *, dashed: bool = False) -> Curve:
    """The curve of a training; long ones are averaged over equal stretches."""
    known = [line for line in facts.metrics[system] if line["loss"] is not None]
    measured = [line for line in facts.held_out[system] if line["loss"] is not None]
    stretch = -(-len(known) // _MOST_POINTS) or 1
    parts = [known[at : at + stretch] for at in range(0, len(known), stretch)]
    return Curve(
        label=label,
        tokens=[part[-1]["tokens"] for part in parts],
        losses=[sum(line["loss"] for line in part) / len(part) for part in parts],
        held_out=[(line["tokens"], line["loss"]) for line in measured],
        colour=colour,
        dashed=dashed,
    )


def _experts_by_language(facts: Facts) -> Picture | Missing:
    seed = {tag: score.perplexity for tag, score in facts.scores.get(SEED, {}).items()}
    unspelled = facts.marked("?")
    languages = {t: group.colour for group in facts.groups for t in group.languages if t in seed}
    languages = {tag: colour for tag, colour in languages.items() if tag not in unspelled}
    evaluated = [expert for expert in facts.experts if System(expert.name) in facts.scores]
    if not evaluated or not languages:
        return Missing("No expert has been evaluated yet.")
    experts = {expert.name: facts.colour(expert) for expert in evaluated}
    own = {expert.name: expert.languages for expert in evaluated}
    rows = [
        (name, tag, score.perplexity, seed[tag], score.perplexity / seed[tag])
        for name in experts
        for tag, score in ((t, facts.scores[System(name)].get(t)) for t in languages)
        if score
    ]
    found = {(name, tag): ratio for name, tag, *_, ratio in rows}
    ratios = np.array([[found.get((name, tag), np.nan) for tag in languages] for name in experts])
    served = [tag for tag in languages if any(tag in tags for tags in own.values())]
    best = {tag: min(experts, key=lambda name: found.get((name, tag), np.inf)) for tag in served}
    wins = (
        f"In {sum(tag in own[name] for tag, name in best.items())} of "
        f"{plural(len(served), 'language')} that an expert learned, that expert is the best of all."
        if np.isfinite(ratios).all()
        else "Not every expert was scored on every language."
    )
    cell = 0.44 if len(languages) <= ROOM_FOR_NUMBERS else 0.19
    return Picture(
        title="Every expert on every language",
        alt=f"Heat map of {plural(len(experts), 'expert')} by "
        f"{plural(len(languages), 'language')}: perplexity against the seed. {wins}",
        caption="Change of perplexity against the seed, in percent or as a factor (×); an expert's "
        f"own languages are framed. {wins}",
        columns=("expert", "language", "perplexity", "seed_perplexity", "ratio"),
        rows=rows,
        draw=partial(figures.expert_heatmap, ratios, experts, languages, own),
        size=(max(5.0, 2.4 + cell * len(languages)), 1.9 + 0.34 * len(experts)),
    )
