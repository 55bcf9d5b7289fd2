"""`xelm grow`: an expert for a new language from its nearest relative; no other expert changes."""

import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from clustering.errors import UserError
from clustering.languages import canonical
from experts.expert import SEED, Expert, parse_reference
from experts.grow import grow as grow_registry
from experts.lock import locked, update
from experts.registry import Registry
from xelm.config import Budget, TrainConfig
from xelm.data.contents import Contents, contents_of
from xelm.data.corpus import AnyCorpus, Corpus
from xelm.data.rows import LanguageShare
from xelm.data.store import Store
from xelm.data.text_stats import TextStats, text_stats
from xelm.runs.budget import Plan, announce, check_disk, passes
from xelm.runs.nearest import DEFAULT, nearest_expert
from xelm.runs.options import GrowOptions
from xelm.runs.run import Run
from xelm.runs.text import tokenise
from xelm.runs.train import (
    Job,
    check_parents,
    parent_directory,
    plans_of_jobs,
    publish,
    train_checkpoints,
)


def grow(
    run: Run,
    language: str,
    corpus: AnyCorpus | None = None,
    options: GrowOptions | None = None,
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
        registry = _registry(run, options)
        started = _in_training(registry, tag)
        if started is None:
            origin, reason, lines = _origin(run, tag, corpus, options)
            settings = _own_settings(run)
            # Refused before it costs anything.
            child = grow_registry(registry, tag, origin).expert(tag)
            check_parents(run, [parent_directory(run, child)])
            text = _contents(run, corpus, tag)
            store = tokenise(run, text, run.tokenizer(), tag, workers=options.workers)
            _job(run, registry, child, store)  # so is what cannot be trained
            for line in lines:
                print(line, file=sys.stderr)
            registry = update(
                run.directory,
                lambda r: grow_registry(r, tag, origin, reason=reason, settings=settings),
            )
            started = registry.expert(tag)
        else:
            run, store = _going_on(run, started, corpus, options)
        facts = {} if started.reason is None else {"parent chosen": started.reason}
        job = _job(run, registry, started, store)
        plans = plans_of_jobs(run, [job])
        announce(plans)
        check_disk(run.directory, plans)
        for error in train_checkpoints(run, [job]).values():
            raise error
        publish(run, started, facts)
    return run.registry().expert(started.name)


def plan_growth(
    run: Run,
    language: str,
    corpus: AnyCorpus | None = None,
    options: GrowOptions | None = None,
) -> tuple[Expert, Plan, TextStats]:
    """The expert that `grow` would make, what its training costs, and statistics of its text, which
    is tokenised in a temporary folder; nothing in the RUN changes. UserError where `grow` raises it
    before it trains."""
    tag, options = canonical(language), options or GrowOptions()
    registry = _registry(run, options)
    with TemporaryDirectory() as folder:
        expert = _in_training(registry, tag)
        if expert is None:
            origin, _, _ = _origin(run, tag, corpus, options)
            registry = grow_registry(registry, tag, origin)
            expert = registry.expert(tag)
            elsewhere = replace(run, directory=Path(folder))
            tokenizer = run.tokenizer()
            tokenizer.hub.save_pretrained(elsewhere.training("tokenizer"))
            text = _contents(run, corpus, tag)
            store = tokenise(elsewhere, text, tokenizer, tag, workers=options.workers)
        else:
            run, store = _going_on(run, expert, corpus, options)
        (plan,) = plans_of_jobs(run, [_job(run, registry, expert, store)])
        check_disk(run.directory, [plan])
        return expert, plan, text_stats(store)[tag]


def _contents(run: Run, corpus: AnyCorpus | None, tag: str) -> Contents:
    """Contents of a corpus, by default the RUN's, in one language."""
    return contents_of(Corpus.of(corpus or run.record["corpus"]).pinned(), [tag])


def _registry(run: Run, options: GrowOptions) -> Registry:
    """The registry of a RUN; UserError if nothing can be grown with these options."""
    if options.by is not None and options.parent != "auto":
        raise UserError(
            f"--by {options.by} chooses a parent, and --parent {options.parent} names one; give "
            "one of them"
        )
    registry = run.registry()
    if not registry.published():
        raise UserError(f"{run.directory} has no published expert to grow from; train some first")
    return registry


def _origin(
    run: Run, tag: str, corpus: AnyCorpus | None, options: GrowOptions
) -> tuple[str, str, list[str]]:
    """Parent of a growth that begins, the reason for it, and the lines to print."""
    if options.parent != "auto":
        return options.parent, "named by hand", []
    nearest = nearest_expert(run, tag, options.by or DEFAULT, corpus or run.record["corpus"])
    line = f"{tag} grows from {nearest.expert.name}, which {nearest.reason}"
    return nearest.expert.name, nearest.reason, [*nearest.warnings, line]


def _own_settings(run: Run) -> dict[str, int | float | None]:
    """Settings that were given for this growth alone: name, such as `grow.tokens`, to value."""
    given = {setting.partition("=")[0] for setting in run.settings}
    budget = {f"grow.{field.name}": field.name for field in fields(Budget)}
    return {name: getattr(run.config.grow, budget[name]) for name in budget if name in given}


def _going_on(
    run: Run, started: Expert, corpus: AnyCorpus | None, options: GrowOptions
) -> tuple[Run, Store]:
    """The RUN with the settings with which a growth began, and its text; UserError for another
    corpus, parent or setting than it began with."""
    (tag,) = started.languages
    store = run.store(tag)
    give_up = f"or give it up with: xelm discard {run.directory} {started.name}"
    if corpus and contents_of(corpus, [tag]).fingerprint() != store.record["corpus_sha256"]:
        raise UserError(
            f"{started.reference} is in training already, on "
            f"{Corpus.of(store.record['corpus'])}; {Corpus.of(corpus)} holds "
            f"something else. Go on without --corpus, {give_up}"
        )
    if options.parent not in ("auto", started.parent, started.parent.partition("@")[0]):
        raise UserError(
            f"{started.reference} is in training already, from {started.parent}; "
            f"go on with that parent, {give_up}"
        )
    by = options.by
    if by is not None and f"the nearest language by {by}," not in (started.reason or ""):
        raise UserError(
            f"{started.reference} is in training already, from {started.parent} "
            f"({started.reason}); go on without --by, {give_up}"
        )
    began, of_run = started.settings or {}, replace(run, settings=()).config.grow
    for name, value in _own_settings(run).items():
        before = began.get(name, getattr(of_run, name.partition(".")[2]))
        if value != before:
            raise UserError(
                f"{started.reference} is in training already, with {name}={before}; got {value}. "
                f"Go on without it, {give_up}"
            )
    again = [
        f"{name}={'null' if value is None else value}"
        for name, value in began.items()
        if name not in _own_settings(run)
    ]
    return replace(run, settings=[*run.settings, *again]), store


def _in_training(registry: Registry, tag: str) -> Expert | None:
    """The grown expert of a language whose training has begun."""
    grown = (e for e in registry.training() if e.cluster is None and e.languages == (tag,))
    return next(grown, None)


def _job(run: Run, registry: Registry, expert: Expert, store: Store) -> Job:
    """The training of a grown expert on its language and those of its parent."""
    (tag,) = expert.languages
    sources = [LanguageShare(ids=store.languages[tag], share=1 - run.config.donor_share)]
    sources += _donors(run, registry, expert)
    # Rounds count from 2; no child sees its donors' rows in the order its parent saw them.
    random_seed = run.config.grow.random_seed + expert.round - 2
    config = _within_passes(tag, sources, run.config.grow)
    return Job(
        name=expert.name,
        part="grow",
        parent=parent_directory(run, expert),
        target=expert.directory(run.directory),
        sources=sources,
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


def _donors(run: Run, registry: Registry, expert: Expert) -> Sequence[LanguageShare]:
    """Text of the parent's languages, in equal parts of the donors' share."""
    share = run.config.donor_share
    origin = None if expert.parent == SEED else registry.expert(*parse_reference(expert.parent))
    if share == 0 or origin is None:
        return []
    tags = origin.languages or tuple(origin.documents or ())
    known = {
        tag: ids for store in run.stores(tags).values() for tag, ids in store.languages.items()
    }
    return [LanguageShare(ids=known[tag], share=share / len(tags)) for tag in tags]
