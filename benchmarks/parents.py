"""How often the nearest language is one of the closest relatives, by the measures of the mixture.

    python benchmarks/parents.py

For languages with a two-letter code, each time one is new and eleven others, drawn at random, are
served. Counted are the draws in which some served language has an ancestor in common with the new
one, and the nearest has fewer in common with it than another. `genealogy` alone is 0 by definition;
it cannot say which language is nearest where none is related, or several are equally close.
"""

import argparse

import numpy as np
from langcodes import data_dicts

from clustering import genealogy, geography, typology, uriel
from clustering.distances import combine
from clustering.errors import UserError
from clustering.languages import canonical

DRAWS = 400
SERVED = 11
# Weights of genealogy, filled typology and geography.
MIXTURES = (
    (0.6, 0.2, 0.2),
    (0.7, 0.15, 0.15),
    (0.5, 0.3, 0.2),
    (0.4, 0.4, 0.2),
    (0, 1, 0),
    (0, 0, 1),
)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    tags = sorted({tag for code in data_dicts.LANGUAGE_ALPHA3 if (tag := _placed(code))})
    values, _ = uriel.features(tags, "fam")
    ancestors = {tag: set(np.flatnonzero(row > 0)) for tag, row in zip(tags, values)}
    rng = np.random.default_rng(0)
    drawn = [
        [tags[i] for i in rng.choice(len(tags), 1 + SERVED, replace=False)] for _ in range(DRAWS)
    ]
    related = [d for d in drawn if any(ancestors[d[0]] & ancestors[other] for other in d[1:])]
    print(f"{len(tags)} languages, {len(related)} of {DRAWS} draws with a relative served")
    print("genealogy, typology, geography: draws in which a closer relative was missed")
    for weights in MIXTURES:
        wrong = 0
        for new, *served in related:
            near = _nearest([new, *served], weights)
            shared = {other: len(ancestors[new] & ancestors[other]) for other in served}
            wrong += shared[near] < max(shared.values())
        print(f"{weights}: {wrong} ({wrong / len(related):.1%})")
    print(f"syntax_average alone: {_refused(related)} draws have a pair of which nothing is known")


def _placed(code: str) -> str | None:
    try:
        tag = canonical(code)
    except UserError:
        return None
    return tag if len(tag) == 2 and uriel.known([tag], "geo") else None


def _nearest(tags: list[str], weights: tuple[float, float, float]) -> str:
    parts = (
        genealogy.distances(tags),
        typology.distances(tags, "syntax_knn"),
        geography.distances(tags),
    )
    return combine([part for part in zip(parts, weights) if part[1]]).relatives(tags[0])[0].language


def _refused(drawn: list[list[str]]) -> int:
    return sum(bool(np.isnan(typology.distances(tags).values).any()) for tags in drawn)


if __name__ == "__main__":
    main()
