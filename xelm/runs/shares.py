"""Which documents each model of a RUN is trained on, and in which shares."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from clustering.files import read_arrays
from experts.expert import Expert
from xelm.config import TrainConfig
from xelm.data.rows import LanguageShare, sampling_shares
from xelm.data.store import FRAME, Store
from xelm.runs.run import Run


def all_shares(
    config: TrainConfig, store: Store, left_out: Collection[str] = ()
) -> list[LanguageShare]:
    """All documents of a store, each language in its share of a training with these settings;
    shares sum to 1. left_out: languages without a share."""
    languages = {tag: ids for tag, ids in store.languages.items() if tag not in left_out}
    shares = sampling_shares(
        {tag: len(ids.ids) for tag, ids in languages.items()},
        config.data.sampling_exponent,
        budget=config.tokens,
        max_passes=config.max_passes,
    )
    return [LanguageShare(ids=ids, share=shares[tag]) for tag, ids in languages.items()]


def dense_shares(run: Run) -> list[LanguageShare]:
    """All documents of the corpus, each language in its share of the tokens of the dense baseline
    and of all experts together: both see each language equally often, and none of `unassigned`."""
    return all_shares(run.config.experts, run.store(), unassigned(run))


def unassigned(run: Run) -> Sequence[str]:
    """Languages of the corpus that the RUN's clusters leave out."""
    return run.clusters().unassigned if (run.directory / "clusters.json").exists() else ()


def cluster_shares(run: Run, cluster: str) -> list[LanguageShare]:
    """The documents of one cluster, by language. Their shares are parts of `dense_shares`, and sum
    to the cluster's part of the whole budget."""
    clustering, languages = run.clusters(), {each.ids.language: each for each in dense_shares(run)}
    if not clustering.of_documents:
        return [languages[tag] for tag in clustering.clusters[cluster]]
    labels = read_arrays(run.directory / "assignments.npz")
    index, sources = list(clustering.clusters).index(cluster), []
    for tag, source in languages.items():
        documents, ids = np.flatnonzero(labels[tag] == index), source.ids
        # A document counts by its tokens and those that frame it, as in the packed rows.
        part = (ids.lengths[documents] + FRAME).sum() / (ids.lengths + FRAME).sum()
        if len(documents):
            sources.append(replace(source, share=source.share * part, documents=documents))
    return sources


def expert_shares(run: Run, expert: Expert) -> list[LanguageShare]:
    """The documents of the languages or the cluster that an expert is trained for, without those of
    its donors."""
    if expert.cluster is not None:
        return cluster_shares(run, expert.cluster)
    return [LanguageShare(ids=run.store(t).languages[t], share=1.0) for t in expert.languages]
