"""The number of clusters: a score for each k, and the best one.

The score has silhouettes (Rousseeuw 1987) and stability under resampling; gaps between joins and
balance of sizes are shown beside it. Distances, and those of resampled features, are arguments.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from clustering import grouping
from clustering.clustering import Clustering
from clustering.distances import Distances
from clustering.errors import UserError


class Choice(NamedTuple):
    """Scores of one number of clusters."""

    k: int
    silhouette: float
    """Mean over languages of how much nearer the own cluster is than the next one, -1..1; a
    language alone in its cluster counts 0."""
    gap: float
    """Distance of the next join less that of the last join that was made."""
    balance: float
    """Size of the largest cluster over the mean; 1 is even."""
    stability: float | None
    """Mean adjusted Rand index (Hubert and Arabie 1985) of the clusters and those of resampled
    features, at most 1; None without resampled features."""
    standard_error: float
    """Standard error of the stability; 0 without resampled features."""

    @property
    def score(self) -> float:
        """Sum of silhouette and stability."""
        return self.silhouette + (self.stability or 0.0)


def choices(
    distances: Distances,
    *,
    rule: str = "pairs",
    sizes: Mapping[str, int] | None = None,
    resampled: Iterable[Distances] = (),
) -> list[Choice]:
    """The scores of every k from 2 to half the languages; beyond, most would be alone.

    sizes: as in `grouping.cluster` for the rule `balanced`, and the unit of the balance; None
    counts languages. resampled: distances of the same languages by resampled features. UserError
    for fewer than four languages, and if all distances are 0."""
    languages = distances.languages
    if len(languages) < 4:
        raise UserError(f"k can be chosen for four languages or more; got {len(languages)}")
    if not distances.values.any():
        raise UserError(f"all distances are 0 by {distances.measure}: no k is better than another")
    from sklearn.metrics import adjusted_rand_score, silhouette_score

    weights = None if sizes is None else np.array([sizes[tag] for tag in languages], float)
    clusters_of = partial(grouping.cluster, rule=rule, sizes=sizes if rule == "balanced" else None)
    again = list(resampled)
    found = []
    for k in range(2, len(languages) // 2 + 1):
        try:
            clusters = clusters_of(distances, k)
        except UserError:
            continue  # no clusters of such sizes
        labels = _labels(clusters)
        totals = np.bincount(labels, weights)
        joins = [merge.distance for merge in clusters.merges or ()]  # the last k-1 are not made
        agreed = [adjusted_rand_score(labels, _labels(clusters_of(drawn, k))) for drawn in again]
        found.append(
            Choice(
                k=k,
                silhouette=float(silhouette_score(distances.values, labels, metric="precomputed")),
                gap=joins[1 - k] - joins[-k],
                balance=float(totals.max() / totals.mean()),
                stability=float(np.mean(agreed)) if agreed else None,
                standard_error=float(np.std(agreed) / np.sqrt(len(agreed))) if agreed else 0.0,
            )
        )
    if not found:
        raise UserError(f"no number of clusters from 2 to {len(languages) // 2} has such sizes")
    return found


def best(found: Sequence[Choice]) -> Choice:
    """The k of the highest score; of equal scores, the smallest k."""
    return max(found, key=lambda choice: (choice.score, -choice.k))


def reason(found: Sequence[Choice]) -> str:
    """One line that says why the best k was chosen."""
    chosen = best(found)
    terms = f"silhouette {chosen.silhouette:.2f}"
    if chosen.stability is not None:
        error = chosen.standard_error
        terms += f" + stability {chosen.stability:.2f} ± {error:.2f} = {chosen.score:.2f}"
    others = sorted((c for c in found if c is not chosen), key=lambda c: -c.score)[:2]
    after = f" (then {', '.join(f'k={c.k}: {c.score:.2f}' for c in others)})" if others else ""
    return (
        f"k={chosen.k} of {found[0].k} to {found[-1].k}: {terms}, the most{after}; next join "
        f"{chosen.gap:+.3f} from the last; largest cluster {chosen.balance:.1f} times the mean"
    )


def _labels(clusters: Clustering) -> np.ndarray:
    names = list(clusters.clusters)
    return np.array([names.index(name) for name in clusters.cluster_by_language.values()])
