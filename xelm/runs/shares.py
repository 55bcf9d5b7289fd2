"""Which documents each model of a RUN is trained on, in which shares, and which are held out."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clustering.files import read_arrays
from experts.expert import SEED, Expert, parse_reference
from xelm.config import HeldOutConfig, TrainConfig
from xelm.data.held_out import TrainingText, divide, held_out
from xelm.data.rows import LanguageShare, sampling_shares
from xelm.data.store import FRAME, Store
from xelm.runs.run import Run


def all_text(config: TrainConfig, store: Store, away: HeldOutConfig) -> TrainingText:
    """The documents of a store, each language in its share of a training with these settings;
    shares sum to 1. away: which documents are held out."""
    return divide(_all_shares(config, store, away), away)


def dense_text(run: Run) -> TrainingText:
    """The documents of the corpus, each language in its share of the tokens of the dense baseline
    and of all experts together: both see each language equally often, and none of `unassigned`."""
    return divide(_dense_shares(run), run.config.held_out)


def expert_text(run: Run, expert: Expert) -> TrainingText:
    """The documents of the languages or the cluster that an expert is trained for, without those of
    its donors. Shares of a cluster are parts of those of `dense_text`, and sum to the cluster's
    part of the whole budget."""
    if expert.cluster is not None:
        sources = _cluster_shares(run, expert.cluster)
    else:
        grown = {tag: run.store(tag).languages[tag] for tag in expert.languages}
        sources = [LanguageShare(ids=ids, share=1.0) for ids in grown.values()]
    return divide(sources, run.config.held_out)


def held_out_text(run: Run, but: Collection[str] = ()) -> list[LanguageShare]:
    """The held-out documents of all languages of the corpus and of published grown experts, `but`
    for these."""
    languages = dict(run.store().languages)
    for expert in run.registry().published():
        if expert.cluster is None:
            languages |= {tag: run.store(tag).languages[tag] for tag in expert.languages}
    sources = [LanguageShare(ids=ids, share=1.0) for t, ids in languages.items() if t not in but]
    return divide(sources, run.config.held_out).held_out


def parent_directory(run: Run, expert: Expert) -> Path:
    """The checkpoint that an expert starts from."""
    if expert.parent == SEED:
        return run.seed
    return run.registry().expert(*parse_reference(expert.parent)).directory(run.directory)


def with_passes(config: TrainConfig, tokens: float) -> TrainConfig:
    """The settings of a training with its budget in tokens. tokens: tokens of one pass over its
    text."""
    if config.passes is None:
        return config
    return replace(config, tokens=max(1, round(config.passes * tokens)), passes=None)


def unassigned(run: Run) -> Sequence[str]:
    """Languages of the corpus that the RUN's clusters leave out."""
    return run.clusters().unassigned if (run.directory / "clusters.json").exists() else ()


def _all_shares(
    config: TrainConfig, store: Store, away: HeldOutConfig, left_out: Collection[str] = ()
) -> list[LanguageShare]:
    languages = {tag: ids for tag, ids in store.languages.items() if tag not in left_out}
    whole = [LanguageShare(ids=ids, share=1.0) for ids in languages.values()]
    shares = sampling_shares(
        {
            tag: len(ids.ids) - int(ids.lengths[held_out(ids, away)].sum())
            for tag, ids in languages.items()
        },
        config.data.sampling_exponent,
        budget=with_passes(config, divide(whole, away).tokens).tokens,
        max_passes=config.max_passes,
    )
    return [LanguageShare(ids=ids, share=shares[tag]) for tag, ids in languages.items()]


def _dense_shares(run: Run) -> list[LanguageShare]:
    config = run.config
    return _all_shares(config.experts, run.store(), config.held_out, unassigned(run))


def _cluster_shares(run: Run, cluster: str) -> list[LanguageShare]:
    clustering, languages = run.clusters(), {each.ids.language: each for each in _dense_shares(run)}
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
