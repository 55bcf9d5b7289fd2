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
from experts.registry import Registry
from xelm.data import corpus as corpora
from xelm.data.corpus import AnyCorpus, Corpus
from xelm.data.rows import Source
from xelm.data.store import Store
from xelm.runs.budget import Plan, announce, check_disk
from xelm.runs.init import tokenise
from xelm.runs.relatives import DEFAULT, nearest_expert
from xelm.runs.run import Run
from xelm.runs.texts import LanguageText
from xelm.runs.training import (
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
    *,
    parent: str = "auto",
    by: str = DEFAULT,
    workers: int = 1,
) -> Expert:
    """Trains and publishes an expert for `language` (HMR, X-ELM section 5), or goes on with it.

    corpus: has documents of the language; None takes that of the RUN. parent: an expert's name, or
    "auto" for the one that serves the nearest language by the measure `by`, as
    `relatives.nearest_expert` finds it. A part of the rows, the configuration's `donor_share`, is
    of the parent's languages. workers: as in `init`.
    """
    tag = canonical(language)
    with locked(run.directory, f"train-{tag}"):
        registry = run.registry()
        if not registry.published():
            raise UserError(
                f"{run.directory} has no published expert to grow from; train some first"
            )
        started = _in_training(registry, tag)
        if started is None:
            origin, reason, told = parent, "named by hand", []
            if parent == "auto":
                nearest = nearest_expert(run, tag, by, corpus or run.record["corpus"])
                origin, reason = nearest.expert.name, nearest.reason
                told = [*nearest.warnings, f"{tag} grows from {origin}, which {reason}"]
            # Refused before it costs anything.
            child = grow_registry(registry, tag, origin).expert(tag)
            check_parents(run, [parent_directory(run, child)])
            text = corpus or run.record["corpus"]
            store = tokenise(run, text, tag, languages=[tag], workers=workers)
            for line in told:
                print(line, file=sys.stderr)
            registry = update(run.directory, lambda r: grow_registry(r, tag, origin, reason=reason))
            started = registry.expert(tag)
        else:
            store = run.store(tag)
            if corpus and corpora.fingerprint(corpus, [tag]) != store.record["corpus_sha256"]:
                raise UserError(
                    f"{started.reference} is in training already, on "
                    f"{Corpus.of(store.record['corpus'])}; {Corpus.of(corpus)} holds "
                    "something else. Go on without --corpus, or give it up with: "
                    f"xelm discard {run.directory} {started.name}"
                )
            if parent not in ("auto", started.parent, started.parent.partition("@")[0]):
                raise UserError(
                    f"{started.reference} is in training already, from {started.parent}; "
                    f"go on with that parent, or give it up with: xelm discard {run.directory} "
                    f"{started.name}"
                )
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
    *,
    parent: str = "auto",
    by: str = DEFAULT,
    workers: int = 1,
) -> tuple[Expert, Plan, LanguageText]:
    """What `grow` would make, what its training costs, and its text, which is tokenised in a
    temporary folder; nothing in the RUN changes."""
    tag, registry = canonical(language), run.registry()
    with TemporaryDirectory() as folder:
        expert = _in_training(registry, tag)
        if expert is None:
            origin = parent
            if parent == "auto":
                origin = nearest_expert(run, tag, by, corpus or run.record["corpus"])[0].name
            registry = grow_registry(registry, tag, origin)
            expert = registry.expert(tag)
            elsewhere = replace(run, directory=Path(folder))
            run.tokenizer().hub.save_pretrained(elsewhere.training("tokenizer"))
            text = corpus or run.record["corpus"]
            store = tokenise(elsewhere, text, tag, languages=[tag], workers=workers)
        else:
            store = run.store(tag)
        (plan,) = plans_of_jobs(run, [_job(run, registry, expert, store)])
        check_disk(run.directory, [plan])
        return expert, plan, LanguageText.of(store, tag)


def _in_training(registry: Registry, tag: str) -> Expert | None:
    """The grown expert of a language whose training has begun."""
    grown = (e for e in registry.training() if e.cluster is None and e.languages == (tag,))
    return next(grown, None)


def _job(run: Run, registry: Registry, expert: Expert, store: Store) -> Job:
    """The training of a grown expert on its language, and on its parent's."""
    (tag,) = expert.languages
    sources = [Source(ids=store.languages[tag], share=1 - run.config.donor_share)]
    sources += _donors(run, registry, expert)
    # Rounds count from 2; no child sees its donors' rows in the order its parent saw them.
    random_seed = run.config.grow.random_seed + expert.round - 2
    return Job(
        name=expert.name,
        part="grow",
        parent=parent_directory(run, expert),
        target=expert.directory(run.directory),
        sources=sources,
        config=replace(run.config.grow, random_seed=random_seed),
    )


def _donors(run: Run, registry: Registry, expert: Expert) -> Sequence[Source]:
    """The parent's languages, in equal parts of the donors' share."""
    share = run.config.donor_share
    origin = None if expert.parent == SEED else registry.expert(*parse_reference(expert.parent))
    if share == 0 or origin is None:
        return []
    tags = origin.languages or tuple(origin.documents or ())
    known = {
        tag: ids for store in run.stores(tags).values() for tag, ids in store.languages.items()
    }
    return [Source(ids=known[tag], share=share / len(tags)) for tag in tags]
