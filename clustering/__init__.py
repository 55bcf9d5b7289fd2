"""Clusters of languages or of documents, and distances between languages.

    from clustering import typology

    clusters = typology.cluster(["en", "es", "de", "el"], k=2)    # a Clustering
    print(clusters)
    clusters.save("DIR")
    clusters.plot_tree()

Distances between languages:
    typology, genealogy, geography    by the data of URIEL; also typology.cluster
    table                             by a CSV file of features
    lexical                           by common words, n-grams, subwords or names
    internal                          by the states or updates of a model, or losses of experts
    distances                         Distances, and combine for a weighted mean of several

Clusters:
    grouping                          cluster languages by their distances; RULES
    choice                            choose the number of clusters
    tfidf, ngrams                     cluster documents by subwords, or by characters
    control                           random clusters, and clusters by hand
    clustering                        Clustering: load, save, cluster_of, assign, plot_tree, ...

Languages:
    languages                         canonical codes, look-ups, English names
    identify, novelty                 the language of a text; texts in unknown languages

Importing the package loads nothing; a submodule is loaded when it is first used. No model is loaded
here, and JAX is not imported: texts are strings or arrays of subword ids.
"""

from importlib import import_module
from typing import Any

# The names are submodules, loaded when first used.
# pyright: reportUnsupportedDunderAll=false
__all__ = [
    *("choice", "clustering", "control", "distances", "genealogy", "geography", "grouping"),
    *("identify", "internal", "languages", "lexical", "ngrams", "novelty", "table", "tfidf"),
    "typology",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"clustering.{name}")
    raise AttributeError(f"module 'clustering' has no attribute {name!r}")
