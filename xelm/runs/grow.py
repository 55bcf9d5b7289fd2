"""`xelm grow`: an expert for a new language from its nearest relative; no other expert changes."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from clustering.errors import UserError
from clustering.languages import canonical
from experts.expert import SEED, Expert, parse_reference
from experts.grow import grow as grow_registry
from experts.lock import locked, update
from xelm.config import TrainConfig
from xelm.data.contents import contents_in, contents_of
from xelm.data.corpus import AnyCorpus, Corpus
from xelm.data.held_out import divide
from xelm.data.rows import LanguageShare
from xelm.data.store import Store
from xelm.data.text_stats import TextStats, text_stats
from xelm.runs import train
from xelm.runs.budget import Plan, announce, check_disk, passes
from xelm.runs.nearest import DEFAULT, nearest_expert
from xelm.runs.options import GrowOptions
from xelm.runs.publish import publish
from xelm.runs.run import Run
from xelm.runs.shares import parent_directory, with_passes
from xelm.runs.text import tokenise
from xelm.settings import own_settings


def grow(
    run: Run, language: str, corpus: AnyCorpus | None = None, options: GrowOptions | None = None
) -> Expert:
    """Trains and publishes an expert for `language` (HMR, X-ELM section 5), or resumes its
    training.

    corpus: has documents of the language; None takes that of the RUN. options: None: the defaults.
    A part of the rows, the configuration's `donor_share`, is of the parent's languages. The
    settings `grow.tokens` and `grow.max_passes` of the RUN are recorded when a training begins, and
    used when it resumes. UserError for a training that began with other arguments.
    """
    tag, options = canonical(language), options or GrowOptions()
    with locked(run.directory, f"train-{tag}"):
        run, expert, store = _prepared(run, tag, corpus, options, run)
        job = _job(run, expert, store)  # what cannot be trained is refused
        update(
            run.directory,
            lambda registry: grow_registry(
                registry, tag, expert.parent, reason=expert.reason, settings=expert.settings
            ),
            "grow",
        )
        plans = train.plans_of_jobs(run, [job])
        announce(plans)
        check_disk(run.directory, plans)
        for error in train.train_checkpoints(run, [job]).values():
            raise error
        publish(run, expert)
    return run.registry().expert(expert.name)


def plan_growth(
    run: Run, language: str, corpus: AnyCorpus | None = None, options: GrowOptions | None = None
) -> tuple[Expert, Plan, TextStats]:
    """The expert that `grow` would make, what its training costs, and statistics of its text, which
    is tokenised in a temporary folder; nothing in the RUN changes. UserError where `grow` raises it
    before it trains."""
    with TemporaryDirectory() as folder:
        place = replace(run, directory=Path(folder))
        run.tokenizer().hub.save_pretrained(place.training("tokenizer"))
        tag, options = canonical(language), options or GrowOptions()
        run, expert, store = _prepared(run, tag, corpus, options, place)
        (plan,) = train.plans_of_jobs(run, [_job(run, expert, store)])
        check_disk(run.directory, [plan])
        return expert, plan, text_stats(store)[tag]


def _prepared(
    run: Run, tag: str, corpus: AnyCorpus | None, options: GrowOptions, place: Run
) -> tuple[Run, Expert, Store]:
    """The RUN with the settings of a growth, its expert, which is not in the registry where the
    growth is to begin, and its text, which is tokenised in `place` then. UserError for what cannot
    be grown, before it costs anything."""
    if options.by is not None and options.parent != "auto":
        raise UserError(
            f"--by {options.by} chooses a parent, and --parent {options.parent} names one; give "
            "one of them"
        )
    registry = run.registry()
    if not registry.published():
        raise UserError(f"{run.directory} has no published expert to grow from; train some first")
    for expert in registry.training():
        if expert.cluster is None and expert.languages == (tag,):
            return _resumed(run, expert, corpus, options)
    origin, reason, lines = options.parent, "named by hand", ()
    if origin == "auto":
        nearest = nearest_expert(run, tag, options.by or DEFAULT, corpus or run.record["corpus"])
        origin, reason = nearest.expert.name, nearest.reason
        lines = (*nearest.warnings, f"{tag} grows from {origin}, which {reason}")
    settings = own_settings(run.config, run.settings, "grow")
    registry = grow_registry(registry, tag, origin, reason=reason, settings=settings)
    expert = registry.expert(tag)
    train.check_parents(run, [parent_directory(run, expert)])
    contents = contents_in(corpus or run.record["corpus"], [tag])
    store = tokenise(place, contents, tag, workers=options.workers)
    for line in lines:
        print(line, file=sys.stderr)
    return run, expert, store


def _resumed(
    run: Run, started: Expert, corpus: AnyCorpus | None, options: GrowOptions
) -> tuple[Run, Expert, Store]:
    """The same for a growth that has begun; UserError for another corpus, parent or setting than it
    began with."""
    (tag,) = started.languages
    store, parent, by = run.store(tag), options.parent, options.by
    settings = own_settings(run.config, run.settings, "grow")
    other = None
    if corpus and contents_of(corpus, [tag]).fingerprint() != store.record["corpus_sha256"]:
        other = (
            f"on {Corpus.of(store.record['corpus'])}; {Corpus.of(corpus)} holds something else. "
            "Go on without --corpus"
        )
    elif parent not in ("auto", started.parent, started.parent.partition("@")[0]):
        other = f"from {started.parent}; go on with that parent"
    elif by is not None and f"the nearest language by {by}," not in (started.reason or ""):
        other = f"from {started.parent} ({started.reason}); go on without --by"
    began = started.settings or {}
    of_run = own_settings(replace(run, settings=()).config, run.settings, "grow")
    for name, value in settings.items():
        before = began.get(name, of_run[name])
        if value != before:
            other = other or f"with {name}={before}; got {value}. Go on without it"
    if other:
        raise UserError(
            f"{started.reference} is in training already, {other}, or give it up with: xelm "
            f"discard {run.directory} {started.name}"
        )
    again = [
        f"{name}={'null' if value is None else value}"
        for name, value in began.items()
        if name not in settings
    ]
    return replace(run, settings=[*run.settings, *again]), started, store


def _job(run: Run, expert: Expert, store: Store) -> train.Job:
    """The training of a grown expert on its language and those of its parent."""
    (tag,) = expert.languages
    sources = [LanguageShare(ids=store.languages[tag], share=1 - run.config.donor_share)]
    sources += _donors(run, expert)
    # Rounds count from 2; no child sees its donors' rows in the order its parent saw them.
    random_seed = run.config.grow.random_seed + expert.round - 2
    text = divide(sources, run.config.held_out)
    own = text.sources[0]
    config = with_passes(run.config.grow, own.tokens / own.share)
    config = _within_passes(tag, text.sources, config)
    return train.Job(
        name=expert.name,
        part="grow",
        parent=parent_directory(run, expert),
        target=expert.directory(run.directory),
        text=text,
        config=replace(config, random_seed=random_seed),
    )


def _within_passes(tag: str, sources: Sequence[LanguageShare], config: TrainConfig) -> TrainConfig:
    """The configuration with the largest number of steps that passes over no language more often
    than `max_passes`, if there is such a limit."""
    if config.max_passes is None:
        return config
    most = max(passes(sources, config).values()) / config.steps
    steps = int(config.max_passes / most + 1e-9)
    if steps >= config.steps:
        return config
    if not steps:
        raise UserError(
            f"{tag}: one step passes over its text or its parent's {most:.3g} times, and "
            f"grow.max_passes is {config.max_passes:g}; give more text, or raise grow.max_passes"
        )
    return replace(config, tokens=steps * config.tokens_per_step)


def _donors(run: Run, expert: Expert) -> Sequence[LanguageShare]:
    """Text of the parent's languages, in equal parts of the donors' share."""
    share = run.config.donor_share
    if share == 0 or expert.parent == SEED:
        return []
    origin = run.registry().expert(*parse_reference(expert.parent))
    tags = origin.languages or tuple(origin.documents or ())
    known = {t: ids for s in run.stores(tags).values() for t, ids in s.languages.items()}
    return [LanguageShare(ids=known[tag], share=share / len(tags)) for tag in tags]
