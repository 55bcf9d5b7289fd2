"""`xelm grow`: experts for new languages from their nearest relatives; no other expert changes."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from clustering.errors import UserError
from experts.begin import begin
from experts.expert import Expert
from experts.grow import begun_with, is_grown
from experts.grow import grow as grow_registry
from experts.lock import locked, update
from xelm.data.contents import contents_in, contents_of
from xelm.data.corpus import AnyCorpus, Corpus
from xelm.data.store import Store
from xelm.data.text_stats import TextStats, text_stats
from xelm.runs import join, train
from xelm.runs.budget import Plan, check_disk
from xelm.runs.jobs import already_begun, command_of, expert_job, other_settings
from xelm.runs.language import check_language
from xelm.runs.nearest import DEFAULT, nearest_expert
from xelm.runs.new_languages import groups_of, languages_to_grow
from xelm.runs.options import GrowOptions
from xelm.runs.run import Run
from xelm.runs.shares import as_recorded, parent_directory, unused_text
from xelm.runs.text import elsewhere, tokenise
from xelm.runs.vocabulary import check_extension, with_vocabulary
from xelm.settings import own_settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """What a growth would make."""

    experts: list[Expert]
    """The new experts, or the next version of one that languages join."""
    plans: list[Plan]
    """What the training of each costs."""
    texts: list[TextStats]
    """Statistics of the new text, by language."""


def grow(
    run: Run,
    languages: str | Sequence[str] = (),
    corpus: AnyCorpus | None = None,
    options: GrowOptions | None = None,
) -> list[Expert]:
    """Trains and publishes experts for new languages (HMR, X-ELM section 5), or resumes their
    training. Several languages form clusters first, with an expert for each.

    corpus: has documents of the languages; None takes that of the RUN. options: None: the defaults.
    Parts of the rows, the configuration's `donor_share` and `grow.data.replay_share`, are of the
    parent's languages and of all others. The settings of `grow` that the RUN has are recorded when
    a training begins, and used when it resumes. UserError for a training that began with other
    arguments, and, once all were tried, for experts that could not be trained or published.
    """
    options = options or GrowOptions()
    given = [languages] if isinstance(languages, str) else languages
    tags = languages_to_grow(run, given, corpus, options.family)
    if options.into is not None:
        return [join.join(run, options.into, tags, corpus, options)]
    with ExitStack() as stack:
        for name in _names(run, tags, corpus, options):
            stack.enter_context(locked(run.directory, f"train-{name}"))
        prepared = _prepared(run, tags, corpus, options, run)
        # What cannot be trained is refused before anything is recorded.
        jobs = [expert_job(its, expert) for its, expert, _ in prepared]
        experts = [expert for _, expert, _ in prepared]
        update(run.directory, lambda registry: begin(registry, *experts), "grow")
        found, errors = [], []
        for (its, expert, _), job in zip(prepared, jobs):
            if expert.status == "published":
                found.append(expert)
                continue
            try:
                found.append(train.finish(its, expert, job))
            except UserError as error:
                errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else UserError("; ".join(map(str, errors)))
    return found


def plan_growth(
    run: Run,
    languages: str | Sequence[str] = (),
    corpus: AnyCorpus | None = None,
    options: GrowOptions | None = None,
) -> Growth:
    """The experts that `grow` would make, what their training costs, and statistics of their text,
    which is tokenised in a temporary folder; nothing in the RUN changes. UserError where `grow`
    raises it before it trains."""
    options = options or GrowOptions()
    given = [languages] if isinstance(languages, str) else languages
    tags = languages_to_grow(run, given, corpus, options.family)
    with elsewhere(run) as place:
        if options.into is not None:
            prepared = [join.prepared(run, options.into, tags, corpus, options, place)]
        else:
            prepared = _prepared(run, tags, corpus, options, place)
        left = [each for each in prepared if each[1].status != "published"]
        plans = [
            plan
            for its, expert, new in left
            for plan in train.plans_of_jobs(its, [expert_job(its, expert, new)])
        ]
        check_disk(run.directory, plans)
        texts = [stats for _, _, new in left for store in new.values() for stats in _stats(store)]
        return Growth(experts=[expert for _, expert, _ in prepared], plans=plans, texts=texts)


def _stats(store: Store) -> Sequence[TextStats]:
    return list(text_stats(store).values())


def _names(
    run: Run, tags: Sequence[str], corpus: AnyCorpus | None, options: GrowOptions
) -> list[str]:
    """Names of the experts of a growth, begun or not."""
    _check_parents_exist(run)
    begun = _begun(run, tags)
    return [e.name for e in begun] or list(groups_of(run, tags, corpus, options))


def _check_parents_exist(run: Run) -> None:
    if not run.registry().published():
        raise UserError(f"{run.directory} has no published expert to grow from; train some first")


def _prepared(
    run: Run, tags: Sequence[str], corpus: AnyCorpus | None, options: GrowOptions, place: Run
) -> list[tuple[Run, Expert, Mapping[str, Store]]]:
    """For each expert of a growth the RUN with its settings, the expert, which is not in the
    registry where the growth is to begin, and its new text by name, which is tokenised in `place`
    then. UserError for what cannot be grown, before it costs anything."""
    _check_parents_exist(run)
    if begun := _begun(run, tags):
        if options.clusters not in (None, len(begun)):
            raise UserError(
                f"{', '.join(e.name for e in begun)} are in training already, {len(begun)} experts "
                f"for {' '.join(tags)}; go on without --clusters"
            )
        return [_resumed(run, expert, corpus, options) for expert in begun]
    registry, lines = run.registry(), []
    groups = groups_of(run, tags, corpus, options)
    settings = own_settings(run.config, run.settings, "grow")
    for name, members in groups.items():
        origin, reason = options.parent, "named by hand"
        if origin == "auto":
            by = options.by or DEFAULT
            nearest = nearest_expert(run, members, by, corpus or run.record["corpus"])
            origin, reason = nearest.expert.name, nearest.reason
            # Of a cluster of languages the name may not say which.
            which = name if len(members) == 1 else f"{name} ({' '.join(members)})"
            lines += [*nearest.warnings, f"{which} grows from {origin}, which {reason}"]
        registry = grow_registry(
            registry,
            members,
            origin,
            name,
            corpora=(unused_text(registry, name),),
            reason=reason,
            settings=settings,
        )
    experts = registry.experts[-len(groups) :]
    for expert in experts:
        check_extension(run, expert, options)
    train.check_parents(run, [parent_directory(run, expert) for expert in experts])
    contents = {e.name: contents_in(corpus or run.record["corpus"], e.languages) for e in experts}
    stores = {}
    for expert in experts:
        (text,) = expert.texts
        stores[text] = tokenise(place, contents[expert.name], text, workers=options.workers)
    for line in lines:
        print(line, file=sys.stderr)
    for store in stores.values():
        check_language(run, store)
    found = []
    for expert in experts:
        (text,) = expert.texts
        own = with_vocabulary(run, expert, stores[text], contents[expert.name], options)
        found.append((run, own, {text: stores[text]}))
    return found


def _begun(run: Run, tags: Sequence[str]) -> list[Expert]:
    """The experts of a growth of these languages that has begun and is not done; empty if there is
    none. UserError for a growth of other languages with one of them."""
    registry = run.registry()
    for expert in registry.training():
        if not (is_grown(expert) and set(expert.languages) & set(tags)):
            continue
        group = begun_with(registry, expert)
        languages = [tag for one in group for tag in one.languages]
        if set(languages) != set(tags):
            began = f", for {' '.join(expert.languages)}; go on with: {command_of(run, expert)}"
            raise already_begun(run, expert, began)
        return group
    return []


def _resumed(
    run: Run, started: Expert, corpus: AnyCorpus | None, options: GrowOptions
) -> tuple[Run, Expert, Mapping[str, Store]]:
    """The same for an expert whose growth has begun; UserError for another corpus, parent or
    setting than it began with."""
    (name,) = started.texts
    store, parent, by = run.store(name), options.parent, options.by
    other = None
    if corpus and not _same_text(corpus, started, store):
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
        raise already_begun(run, started, f", {other}")
    return as_recorded(run, started), started, {name: store}


def _same_text(corpus: AnyCorpus, expert: Expert, store: Store) -> bool:
    contents = contents_of(corpus, list(expert.languages))
    return contents.fingerprint() == store.record["corpus_sha256"]


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
