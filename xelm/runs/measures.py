"""Names of the measures of languages and the data that they read. Imports nothing heavy, so that
options of the command line can be made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MEASURES: Mapping[str, Sequence[str]] = {
    "mixture": ("corpus", "features", "only"),
    "typology": ("features", "only"),
    "genealogy": (),
    "geography": (),
    "table": ("table", "only"),
    "words": ("corpus",),
    "characters": ("corpus",),
    "subwords": ("corpus",),
    "names": ("tagged",),
    "states": ("states", "layer"),
    "alignment": ("states", "layer"),
    "updates": ("updates", "layer"),
    "losses": (),
}
"""Measure -> the fields of `xelm.runs.distances.Sources` that it reads, apart from `run`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Data that some of the measures read, as a user names them."""

    features: str | None = None
    """Feature sets of URIEL for typology and mixture, such as syntax_knn+phonology_knn. None:
    syntax_average, or syntax_knn for mixture."""
    only: Sequence[str] = ()
    """Names of the features to use for typology, mixture and table. Empty: all."""
    table: str | Path | None = None
    """CSV file of features by language, for table."""
    tagged: str | Path | None = None
    """Folder of files <language>.conllu[.gz|.zst], for names."""
    states: str | Path | None = None
    """File that xelm features wrote, for states and alignment."""
    updates: str | Path | None = None
    """File that xelm features --of updates wrote, for updates."""
    layer: int | None = None
    """Layer of the model. None: the middle one for states and alignment, the last three for
    updates."""
