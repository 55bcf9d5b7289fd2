"""Clusters of languages from distances, by one of several rules.

The rules are in `pairing`, `agglomerative` and `capacity`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from clustering import agglomerative, capacity, pairing
from clustering.clustering import Clustering
from clustering.distances import Distances
from clustering.errors import UserError
from clustering.names import name_clusters
from clustering.tree import Grouping

Rule = Callable[..., Grouping]
"""Function of (languages, distances [languages, languages], k) that returns a `Grouping`."""

RULES: Mapping[str, Rule] = {
    # Rounds of closest pairs, sizes within one of each other, at the price of some distant pairs
    # (X-ELM, Blevins et al. 2024, section 3.1).
    "pairs": pairing.pairs,
    # Groups of any size: the two groups join whose closest, mean or farthest languages are nearest.
    "single": partial(agglomerative.join, linkage="single"),
    "average": partial(agglomerative.join, linkage="average"),
    "complete": partial(agglomerative.join, linkage="complete"),
    # Groups around a central language, balanced in number of languages or in `sizes`.
    "balanced": capacity.balanced,
}


def cluster(
    distances: Distances,
    k: int,
    *,
    rule: str = "pairs",
    sizes: Mapping[str, int] | None = None,
    unassigned: Sequence[str] = (),
) -> Clustering:
    """k clusters of near languages, with a tree, by one of `RULES`.

    sizes: a number for each language, such as its tokens, which the rule `balanced` balances
    instead of numbers of languages. unassigned: languages left out on purpose. Raises UserError if
    k is not in 1..languages, for an unknown rule, for sizes with another rule, missing or not above
    zero, and for unknown distances (see `Distances.without_gaps`)."""
    check_rule(rule)
    languages = distances.languages
    if not 1 <= k <= len(languages):
        raise UserError(f"k must be between 1 and {len(languages)} languages; got {k}")
    distances.complete()
    more = {} if sizes is None else {"sizes": _checked(sizes, languages, rule)}
    found = RULES[rule](languages, distances.values, k, **more)
    return Clustering(
        method=distances.measure,
        parameters={"k": k, "rule": rule, "sizes": None if sizes is None else dict(sizes)},
        clusters=name_clusters(found.groups),
        unassigned=tuple(unassigned),
        languages=languages,
        distances=distances,
        merges=tuple(found.merges),
        made_from=distances.made_from,
    )


def check_rule(rule: str) -> None:
    """Raises UserError for an unknown rule."""
    if rule not in RULES:
        raise UserError(f"unknown rule {rule!r}; there are {', '.join(RULES)}")


def _checked(sizes: Mapping[str, int], languages: Sequence[str], rule: str) -> np.ndarray:
    if rule != "balanced":
        raise UserError(f"sizes go with the rule balanced; got {rule}")
    bad = [tag for tag in languages if not sizes.get(tag, 0) > 0]
    if bad:
        raise UserError(f"sizes must be above zero for {', '.join(bad[:5])}")
    return np.array([sizes[tag] for tag in languages], float)
