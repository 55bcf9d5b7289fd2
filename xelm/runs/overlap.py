"""How much of an evaluated text is in the text that a RUN was trained on. Imports no JAX."""

import sys
from dataclasses import replace

import numpy as np

from xelm.data.duplicates import Fingerprints, overlap
from xelm.data.held_out import held_out
from xelm.data.store import Store
from xelm.data.text_stats import TextStats, text_stats
from xelm.runs.run import Run


def compare_with_training(
    run: Run, store: Store, max_documents: int | None = None
) -> dict[str, TextStats]:
    """Statistics of an evaluated text by language, with the documents that are in any text that the
    RUN was trained on: its corpus, and the further text of the experts in its registry, but for
    what was held out there.

    max_documents: number of documents of each language to compare, the first ones; None: all.
    Where the training text is missing or cannot be compared, one line on stderr says so.
    """
    found = text_stats(store)
    # Text that was tokenised for a growth that did not begin to train is not among these.
    texts = {name for expert in run.registry().experts for name in expert.texts}
    mine: dict[str, Fingerprints] | None = store.fingerprints()
    known: list[Fingerprints] = []
    for name in ("train", *sorted(texts - {"train"})):
        folder = run.directory / "corpus" / name
        trained = run.store(name) if (folder / "store.json").exists() else None
        theirs = None if trained is None else trained.fingerprints()
        if trained is None or mine is None or theirs is None:
            print(
                f"whether this text was trained on is unknown: {folder} is missing, or its "
                "documents were compared by another method",
                file=sys.stderr,
            )
            return found
        for tag, prints in theirs.items():
            away = held_out(trained.languages[tag], run.config.held_out)
            known.append(Fingerprints(*(np.delete(part, away, axis=0) for part in prints)))
    assert mine is not None  # as the first name, "train", has shown
    parts = [
        Fingerprints(*(np.asarray(part[:max_documents]) for part in mine[tag])) for tag in found
    ]
    whole = overlap(Fingerprints(*map(np.concatenate, zip(*parts))), known)
    ends = np.cumsum([len(prints.hashes) for prints in parts])[:-1]
    exact, near = np.split(whole.exact, ends), np.split(whole.near, ends)
    return {
        tag: replace(text, compared=len(e), exact=int(e.sum()), near=int(n.sum()))
        for (tag, text), e, n in zip(found.items(), exact, near)
    }
