"""Which documents each model of a RUN is trained on, and in which shares."""

from collections.abc import Mapping

import numpy as np

from clustering.files import read_arrays
from experts.expert import Expert
from xelm.config import TrainConfig
from xelm.data.rows import LanguageShare, sampling_shares
from xelm.data.store import Store, TokenizedLanguage
from xelm.runs.run import Run


def language_shares(run: Run) -> dict[str, float]:
    """Share of each language in the tokens of all experts together, which is also its share in the
    tokens of the dense baseline: both see each language equally often. Languages that the RUN's
    clusters leave unassigned have no share."""
    branched = (run.directory / "clusters.json").exists()
    left_out = run.clusters().unassigned if branched else ()
    stores = run.store().languages.items()
    return shares_of(run.config.experts, {tag: ids for tag, ids in stores if tag not in left_out})


def shares_of(config: TrainConfig, languages: Mapping[str, TokenizedLanguage]) -> dict[str, float]:
    """Share of each language in a training with these settings; shares sum to 1."""
    return sampling_shares(
        {tag: len(ids.ids) for tag, ids in languages.items()},
        config.data.sampling_exponent,
        budget=config.tokens,
        max_passes=config.max_passes,
    )


def all_shares(config: TrainConfig, store: Store) -> list[LanguageShare]:
    """All documents of a store, each language in its share of a training with these settings."""
    shares = shares_of(config, store.languages)
    return [LanguageShare(ids=ids, share=shares[tag]) for tag, ids in store.languages.items()]


def dense_shares(run: Run) -> list[LanguageShare]:
    """All documents of the corpus, each language in its share of the whole."""
    store, shares = run.store(), language_shares(run)
    return [LanguageShare(ids=store.languages[tag], share=share) for tag, share in shares.items()]


def cluster_shares(run: Run, cluster: str) -> list[LanguageShare]:
    """The documents of one cluster, by language. Their shares are parts of `language_shares`, and
    sum to the cluster's part of the whole budget."""
    clustering, store, shares = run.clusters(), run.store(), language_shares(run)
    if not clustering.of_documents:
        return [
            LanguageShare(ids=store.languages[tag], share=shares[tag])
            for tag in clustering.clusters[cluster]
        ]
    labels = read_arrays(run.directory / "assignments.npz")
    index, sources = list(clustering.clusters).index(cluster), []
    for tag, ids in store.languages.items():
        documents = np.flatnonzero(labels[tag] == index)
        # A document counts by its tokens and the two that frame it, as in the packed rows.
        part = (ids.lengths[documents] + 2).sum() / (ids.lengths + 2).sum()
        if len(documents):
            sources.append(LanguageShare(ids=ids, share=shares[tag] * part, documents=documents))
    return sources


def expert_shares(run: Run, expert: Expert) -> list[LanguageShare]:
    """The documents of the languages or the cluster that an expert is trained for, without those of
    its donors."""
    if expert.cluster is not None:
        return cluster_shares(run, expert.cluster)
    own = [run.store() if tag in run.languages else run.store(tag) for tag in expert.languages]
    return [
        LanguageShare(ids=store.languages[tag], share=1.0)
        for tag, store in zip(expert.languages, own)
    ]
