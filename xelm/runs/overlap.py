"""How much of an evaluated text is in the text that a RUN was trained on. Imports no JAX."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from xelm.data.duplicates import Fingerprints, overlap
from xelm.data.store import Store
from xelm.data.text_stats import TextStats, text_stats
from xelm.runs.run import Run

EVALUATION = "evaluation-"
"""Beginning of the names of stores of evaluated text."""


def compare_with_training(
    run: Run, store: Store, max_documents: int | None = None
) -> tuple[dict[str, TextStats], list[str]]:
    """Statistics of an evaluated text by language, with the documents that are in any text that the
    RUN was trained on: that of the seed and the experts, and of grown experts. max_documents: of
    each language, the first; None compares all.

    Returns besides a line for the user where that is unknown, since a store of an earlier version
    has nothing to compare with.
    """
    found, mine = text_stats(store), store.fingerprints()
    training = list(_training_stores(run))
    lacking = [known.directory.name for known in training if known.fingerprints() is None]
    others = [prints for known in training for prints in (known.fingerprints() or {}).values()]
    if lacking:
        return found, [
            f"whether this text was trained on is unknown: {', '.join(lacking)} in "
            f"{run.directory / 'corpus'} was tokenised by an earlier version of xelm, which kept "
            "nothing to compare with"
        ]
    if mine is None:
        return found, []
    parts = {
        tag: Fingerprints(*(np.asarray(part[:max_documents]) for part in prints))
        for tag, prints in mine.items()
    }
    whole = overlap(Fingerprints(*map(np.concatenate, zip(*parts.values()))), others)
    ends = np.cumsum([len(prints.hashes) for prints in parts.values()])[:-1]
    for tag, exact, near in zip(parts, np.split(whole.exact, ends), np.split(whole.near, ends)):
        counts = {"compared": len(exact), "exact": int(exact.sum()), "near": int(near.sum())}
        found[tag] = replace(found[tag], **counts)
    return found, []


def _training_stores(run: Run) -> Iterator[Store]:
    """The RUN's corpus and those of the grown experts in its registry. Text that was tokenised for
    a growth that did not begin to train is not among them."""
    grown = {tag for e in run.registry().experts if e.cluster is None for tag in e.languages}
    for name in ("train", *sorted(grown)):
        if (run.directory / "corpus" / name / "store.json").exists():
            yield run.store(name)
