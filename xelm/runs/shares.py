"""Which documents each model of a RUN is trained on, in which shares, and which are held out."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clustering.files import read_arrays
from experts.expert import SEED, Expert, parse_reference
from experts.registry import Registry
from xelm.config import HeldOutConfig
from xelm.data.held_out import TrainingText, divide, held_out, held_out_hashes
from xelm.data.rows import LanguageShare, sampling_shares
from xelm.data.store import FRAME, Store, TokenizedLanguage
from xelm.runs.run import Run
from xelm.training_config import DataConfig, TrainConfig


def all_text(config: TrainConfig, store: Store, away: HeldOutConfig) -> TrainingText:
    """The documents of a store, each language in its share of a training with these settings;
    shares sum to 1. away: which documents are held out."""
    return divide(_all_shares(config, store, away), away)


def dense_text(run: Run) -> TrainingText:
    """The documents of the corpus, each language in its share of the tokens of the dense baseline
    and of all experts together: both see each language equally often, and none of `unassigned`."""
    return divided(run, _dense_shares(run))


def expert_text(run: Run, expert: Expert, new: Mapping[str, Store] | None = None) -> TrainingText:
    """The documents of the languages or the cluster that an expert is trained for, without those of
    its donors. Shares of a cluster that is trained on the RUN's corpus alone are parts of those of
    `dense_text`, and sum to the cluster's part of the whole budget; others sum to 1. new: stores by
    name that are not in the RUN yet."""
    if expert.cluster is not None and not expert.corpora:
        return divided(run, _cluster_shares(run, expert))
    run = as_recorded(run, expert)
    # Languages that joined the expert of a cluster came with their text, which the corpus may have.
    apart: set[str] = set()
    if expert.cluster is not None:
        apart = set(expert.languages) - set(run.clusters().clusters[expert.cluster])
    stores = {name: (new or {}).get(name) or run.store(name) for name in expert.texts}
    texts = {
        tag: [
            store.languages[tag]
            for name, store in stores.items()
            if tag in store.languages and (name != "train" or tag not in apart)
        ]
        for tag in expert.languages
    }
    away = run.config.held_out
    tokens = {
        tag: max(1, sum(_trained_tokens(ids, away) for ids in some)) for tag, some in texts.items()
    }
    joined = set(expert.joined or ())
    config = run.config.experts if expert.cluster is not None and not joined else run.config.grow
    exponent = config.data.sampling_exponent
    if joined:
        kept = run.config.kept_share
        parts = {False: kept, True: 1 - kept}
        shares = {}
        for joins, part in parts.items():
            some = {tag: count for tag, count in tokens.items() if (tag in joined) == joins}
            shares |= {tag: part * one for tag, one in sampling_shares(some, exponent).items()}
    elif expert.cluster is not None:
        budget, most = with_passes(config, sum(tokens.values())).tokens, config.max_passes
        shares = sampling_shares(tokens, exponent, budget=budget, max_passes=most)
    else:  # whose steps are limited by its passes
        shares = sampling_shares(tokens, exponent)
    sources = [one for tag in texts for one in spread(texts[tag], shares[tag], run)]
    return divided(run, sources)


def divided(run: Run, sources: Sequence[LanguageShare]) -> TrainingText:
    """The documents of some sources, divided into those to train on and those held out; copies of
    what is held out in any language of the RUN are in neither part."""
    away = run.config.held_out
    texts = [ids for some in run.texts(all_languages(run)).values() for ids in some]
    return divide(sources, away, held_out_hashes(texts, away))


def spread(texts: Sequence[TokenizedLanguage], share: float, run: Run) -> list[LanguageShare]:
    """The texts of one language, which have a share of a training together, each by its number of
    tokens that are not held out, so that all are read equally often."""
    tokens = [_trained_tokens(ids, run.config.held_out) for ids in texts]
    whole = max(1, sum(tokens))
    return [LanguageShare(ids=ids, share=share * (n / whole)) for ids, n in zip(texts, tokens) if n]


def donor_text(run: Run, expert: Expert) -> list[LanguageShare]:
    """Text of the languages of a grown expert's donor, in equal parts of the `donor_share`."""
    share, donor = run.config.donor_share, _donor(run, expert)
    tags = _donor_languages(run, expert)
    if donor is None or not tags:
        return []
    stores = [run.store(name) for name in donor.texts]
    known = {tag: [s.languages[tag] for s in stores if tag in s.languages] for tag in tags}
    return [one for tag in tags for one in spread(known[tag], share / len(tags), run)]


def _donor(run: Run, expert: Expert) -> Expert | None:
    """The expert whose languages a grown expert reads too; None if that is the seed or was removed,
    and for the expert of a cluster."""
    reference = expert.donor or expert.parent
    if expert.cluster is not None or reference == SEED:
        return None
    donor = run.registry().expert(*parse_reference(reference))
    return donor if donor.removed is None else None


def _donor_languages(run: Run, expert: Expert) -> tuple[str, ...]:
    """Languages of the donor of a grown expert, if it reads them, but for its own."""
    donor = _donor(run, expert) if run.config.donor_share else None
    tags = () if donor is None else donor.languages or tuple(donor.documents or ())
    return tuple(tag for tag in tags if tag not in expert.languages)


def replay_text(run: Run, expert: Expert, config: DataConfig, whole: float) -> list[LanguageShare]:
    """Text that an expert replays against forgetting: the languages of the RUN's corpus that are
    neither its own nor its donor's, mixed by `sampling_exponent`, in `replay_share` of a training
    whose shares sum to `whole`. Empty if there is no other language."""
    if config.replay_share == 0:
        return []
    left_out = {*expert.languages, *(expert.documents or ()), *_donor_languages(run, expert)}
    left_out |= set(unassigned(run))
    others = {tag: ids for tag, ids in run.store().languages.items() if tag not in left_out}
    tokens = {tag: _trained_tokens(ids, run.config.held_out) for tag, ids in others.items()}
    others = {tag: ids for tag, ids in others.items() if tokens[tag]}
    known = {tag: tokens[tag] for tag in others}
    if not others:
        return []
    shares = sampling_shares(known, config.sampling_exponent)
    part = config.replay_share * whole
    return [LanguageShare(ids=ids, share=part * shares[tag]) for tag, ids in others.items()]


def held_out_text(run: Run, but: Collection[str] = ()) -> list[LanguageShare]:
    """The held-out documents of all languages of the corpus and of published grown experts, `but`
    for these."""
    tags = [tag for tag in all_languages(run) if tag not in but]
    texts = [ids for some in run.texts(tags).values() for ids in some]
    sources = [LanguageShare(ids=ids, share=1.0) for ids in texts]
    return divide(sources, run.config.held_out).held_out


def all_languages(run: Run) -> list[str]:
    """Languages of the corpus, and those of published experts beside them."""
    served = [tag for expert in run.registry().published() for tag in expert.languages]
    return list(dict.fromkeys([*run.languages, *served]))


def parent_directory(run: Run, expert: Expert) -> Path:
    """The checkpoint that an expert starts from."""
    if expert.parent == SEED:
        return run.seed
    return run.registry().expert(*parse_reference(expert.parent)).directory(run.directory)


def unused_text(registry: Registry, wanted: str) -> str:
    """Name for a tokenised corpus under RUN/corpus that is that of no expert: `wanted`, or else one
    with a number."""
    used = {"train", *(name for expert in registry.experts for name in expert.texts)}
    numbered = (f"{wanted}-{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([wanted], numbered) if name not in used)


def as_recorded(run: Run, expert: Expert) -> Run:
    """The RUN with the settings that are recorded with an expert, unless it has others of the same
    names. A budget in tokens that was given for an expert is in place of the RUN's in passes."""
    given = {setting.partition("=")[0] for setting in run.settings}
    kept = [
        f"{name}={'null' if value is None else value}"
        for name, value in (expert.settings or {}).items()
        if name not in given
    ]
    names = {setting.partition("=")[0] for setting in (*run.settings, *kept)}
    kept += [
        f"{part}.passes=null"
        for part in ("experts", "grow")
        if f"{part}.tokens" in names and f"{part}.passes" not in names
    ]
    return replace(run, settings=[*run.settings, *kept])


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
    tokens = {tag: _trained_tokens(ids, away) for tag, ids in languages.items()}
    shares = sampling_shares(
        tokens,
        config.data.sampling_exponent,
        budget=with_passes(config, sum(tokens.values())).tokens,
        max_passes=config.max_passes,
    )
    return [LanguageShare(ids=ids, share=shares[tag]) for tag, ids in languages.items()]


def _dense_shares(run: Run) -> list[LanguageShare]:
    config = run.config
    return _all_shares(config.experts, run.store(), config.held_out, unassigned(run))


def _cluster_shares(run: Run, expert: Expert) -> list[LanguageShare]:
    clustering, languages = run.clusters(), {each.ids.language: each for each in _dense_shares(run)}
    if not clustering.of_documents:
        return [languages[tag] for tag in expert.languages]
    labels = read_arrays(run.directory / "assignments.npz")
    index, sources = list(clustering.clusters).index(expert.cluster or ""), []
    for tag, source in languages.items():
        documents, ids = np.flatnonzero(labels[tag] == index), source.ids
        # A document counts by its tokens and those that frame it, as in the packed rows.
        part = (ids.lengths[documents] + FRAME).sum() / (ids.lengths + FRAME).sum()
        if len(documents):
            sources.append(replace(source, share=source.share * part, documents=documents))
    return sources


def _trained_tokens(ids: TokenizedLanguage, away: HeldOutConfig) -> int:
    """Number of tokens of the documents that are not held out."""
    return len(ids.ids) - int(ids.lengths[held_out(ids, away)].sum())
