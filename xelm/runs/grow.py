"""`xelm grow`: an expert for a new language from its nearest relative; no other expert changes."""

import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from clustering.errors import UserError
from clustering.languages import canonical
from experts.expert import Expert
from experts.grow import grow as grow_registry
from experts.lock import locked, update
from xelm.data.contents import contents_in, contents_of
from xelm.data.corpus import AnyCorpus, Corpus
from xelm.data.store import Store
from xelm.data.text_stats import TextStats, text_stats
from xelm.runs import train
from xelm.runs.budget import Plan, check_disk
from xelm.runs.jobs import expert_job, other_settings
from xelm.runs.language import check_language
from xelm.runs.nearest import DEFAULT, nearest_expert
from xelm.runs.options import GrowOptions
from xelm.runs.run import Run
from xelm.runs.shares import as_recorded, parent_directory, unused_text
from xelm.runs.text import tokenise
from xelm.runs.vocabulary import check_extension, with_vocabulary
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
        run, expert, _ = _prepared(run, tag, corpus, options, run)
        job = expert_job(run, expert)  # what cannot be trained is refused
        update(
            run.directory,
            lambda registry: grow_registry(
                registry,
                tag,
                expert.parent,
                corpora=expert.corpora,
                reason=expert.reason,
                settings=expert.settings,
                vocabulary=expert.vocabulary,
            ),
            "grow",
        )
        return train.finish(run, expert, job)


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
        new = dict.fromkeys(expert.texts, store)
        (plan,) = train.plans_of_jobs(run, [expert_job(run, expert, new)])
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
        grown = expert.cluster is None and expert.donor is None and expert.made is None
        if expert.languages == (tag,) and grown:
            return _resumed(run, expert, corpus, options)
    origin, reason, lines = options.parent, "named by hand", ()
    if origin == "auto":
        nearest = nearest_expert(run, tag, options.by or DEFAULT, corpus or run.record["corpus"])
        origin, reason = nearest.expert.name, nearest.reason
        lines = (*nearest.warnings, f"{tag} grows from {origin}, which {reason}")
    settings = own_settings(run.config, run.settings, "grow")
    name = unused_text(registry, tag)
    registry = grow_registry(
        registry, tag, origin, corpora=(name,), reason=reason, settings=settings
    )
    expert = registry.expert(tag)
    check_extension(run, expert, options)
    train.check_parents(run, [parent_directory(run, expert)])
    contents = contents_in(corpus or run.record["corpus"], [tag])
    store = tokenise(place, contents, name, workers=options.workers)
    for line in lines:
        print(line, file=sys.stderr)
    check_language(run, store)
    return run, with_vocabulary(run, expert, store, contents, options), store


def _resumed(
    run: Run, started: Expert, corpus: AnyCorpus | None, options: GrowOptions
) -> tuple[Run, Expert, Store]:
    """The same for a growth that has begun; UserError for another corpus, parent or setting than it
    began with."""
    (tag,) = started.languages
    (name,) = started.texts
    store, parent, by = run.store(name), options.parent, options.by
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
    elif found := _other_vocabulary(started, options):
        other = f"{found}. Go on without these options"
    elif found := other_settings(run, started):
        other = f"{found}. Go on without it"
    if other:
        raise UserError(
            f"{started.reference} is in training already, {other}, or give it up with: xelm "
            f"discard {run.directory} {started.name}"
        )
    return as_recorded(run, started), started, store


def _other_vocabulary(started: Expert, options: GrowOptions) -> str | None:
    """How the vocabulary of an expert differs from what options ask for; None if it does not."""
    began = started.vocabulary or {}
    asked = {"pieces": options.extend_vocabulary, "initialise": options.initialise}
    differ = [
        f"{name} {began.get(name, 'none')}; got {value}"
        for name, value in asked.items()
        if value is not None and value != began.get(name)
    ]
    return f"with {differ[0]}" if differ else None
