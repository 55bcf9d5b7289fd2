"""`xelm train --again`: the next version of a published expert, on its text and more."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from clustering.errors import UserError
from experts.begin import begin
from experts.expert import SEED, Expert, parse_reference
from experts.lock import locked, update
from experts.registry import Registry
from xelm.data.contents import Contents, contents_in
from xelm.data.corpus import AnyCorpus, Corpus
from xelm.data.store import Store
from xelm.data.text_stats import TextStats, text_stats
from xelm.runs import train
from xelm.runs.budget import Plan, check_disk
from xelm.runs.jobs import (
    already_begun,
    command_of,
    expert_job,
    made_elsewhere,
    other_settings,
)
from xelm.runs.language import check_language
from xelm.runs.options import AgainOptions
from xelm.runs.run import Run
from xelm.runs.shares import as_recorded, parent_directory, unused_text
from xelm.runs.text import elsewhere, tokenise
from xelm.runs.vocabulary import add_pieces
from xelm.settings import own_settings


def train_again(
    run: Run, name: str, corpus: AnyCorpus | None = None, options: AgainOptions | None = None
) -> Expert:
    """Trains and publishes the next version of an expert, or resumes its training; no other expert
    changes, and the version before is retired.

    corpus: more text in the languages of the expert, beside that of the version in use; None: that
    alone. Exact copies of documents that it has are left out. options: None: the defaults. The
    budget is that of the version in use, unless the RUN has settings of its own for it, such as
    `grow.tokens`, or `experts.tokens` for the expert of a cluster, which are the tokens of this
    training; settings are recorded, and used when it resumes. UserError for a training that began
    with other arguments.
    """
    options = options or AgainOptions()
    with locked(run.directory, f"train-{name}"):
        run, expert, _ = _prepared(run, name, corpus, options, run)
        job = expert_job(run, expert)  # what cannot be trained is refused
        update(run.directory, lambda registry: begin(registry, expert), "again")
        return train.finish(run, expert, job)


def plan_again(
    run: Run, name: str, corpus: AnyCorpus | None = None, options: AgainOptions | None = None
) -> tuple[Expert, Plan, list[TextStats]]:
    """The version that `train_again` would make, what its training costs, and statistics of the
    text that is added, which is tokenised in a temporary folder; nothing in the RUN changes.
    UserError where `train_again` raises it before it trains."""
    with elsewhere(run) as place:
        run, expert, new = _prepared(run, name, corpus, options or AgainOptions(), place)
        (plan,) = train.plans_of_jobs(run, [expert_job(run, expert, new)])
        check_disk(run.directory, [plan])
        texts = [text for store in new.values() for text in text_stats(store).values()]
        return expert, plan, texts


def _prepared(
    run: Run, name: str, corpus: AnyCorpus | None, options: AgainOptions, place: Run
) -> tuple[Run, Expert, dict[str, Store]]:
    """The RUN with the settings of the training, the version, which is not in the registry where
    its training is to begin, and the text that it adds by name, which is tokenised in `place` then.
    UserError for what cannot be trained, before it costs anything."""
    registry = run.registry()
    before = registry.expert(name)
    if begun := registry.unfinished(name):
        return _resumed(run, begun, before, corpus, options)
    before = registry.in_use(name)  # refuses a retired one
    if corpus is not None and before.documents is not None:
        raise UserError(
            f"{name} is the expert of a cluster of documents, whose text is that of the RUN; train "
            "it again without --corpus, or cluster a larger corpus in another RUN"
        )
    facts: dict[str, Any] = {"settings": _settings(run, before)}
    version = registry.next_version(name)
    text, new = unused_text(registry, f"{name}-v{version}"), {}
    if corpus is None:
        _refuse_left_behind(run, name, text)
        facts["corpora"] = before.corpora if before.cluster is not None else before.texts
    else:
        own = before.texts[before.cluster is not None :]
        facts["corpora"] = (*own, text)
    origin = _origin(registry, before, options.start)
    registry = registry.start(name, parent=origin, **facts)
    expert = registry.expert(name, version)
    train.check_parents(run, [parent_directory(run, expert)])
    if corpus is not None:
        older = {other: run.store(other) for other in before.texts}
        contents = _contents(corpus, before.languages)
        new[text] = tokenise(place, contents, text, workers=options.workers, older=older)
        check_language(run, new[text])
        add_pieces(run, expert, [new[text]], contents, workers=options.workers)
    return as_recorded(run, expert), expert, new


def _resumed(
    run: Run,
    begun: Expert,
    before: Expert,
    corpus: AnyCorpus | None,
    options: AgainOptions,
) -> tuple[Run, Expert, dict[str, Store]]:
    """The same for a training that has begun; UserError for another corpus, start or setting than
    it began with, and for a version that did not begin in this way."""
    if begun.made is not None:
        raise made_elsewhere(run, begun)
    if begun.joined:
        raise UserError(
            f"{begun.reference} is in training, since {' '.join(begun.joined)} joins it; go on "
            f"with: {command_of(run, begun)}"
        )
    if begun.version == 1 or (begun.cluster is None and begun.donor is None):
        raise UserError(
            f"{begun.reference} is in training for the first time; go on with: "
            f"{command_of(run, begun)}"
        )
    registry = run.registry()
    others = {text for e in registry.experts if e != begun for text in e.texts}
    added = [text for text in begun.texts if text not in others]
    other = None
    if corpus is not None:
        shas = [run.store(text).record["corpus_sha256"] for text in added]
        if [_contents(corpus, begun.languages).fingerprint()] != shas:
            on = ", ".join(str(Corpus.of(run.store(text).record["corpus"])) for text in added)
            other = f"{f'on {on} too' if on else 'on no more text'}; go on without --corpus"
    if options.start is not None and _origin(registry, before, options.start) != begun.parent:
        other = f"from {begun.parent}; go on without --from"
    elif other is None and (found := other_settings(run, begun)):
        other = f"{found}. Go on without it"
    if other:
        raise already_begun(run, begun, f", {other}")
    return as_recorded(run, begun), begun, {}


def _origin(registry: Registry, before: Expert, start: str | None) -> str:
    """Reference of what a version starts from; UserError for a version without weights, or with
    pieces of its own that `before` does not have."""
    if start is None:
        return before.reference
    if start in (SEED, "parent"):
        return before.parent if start == "parent" else SEED
    origin = registry.expert(*parse_reference(start))
    if not origin.sha256:
        raise UserError(
            f"{origin.reference} is {origin.status}: there are no weights to start from"
        )
    if origin.vocabulary not in (None, before.vocabulary):
        raise UserError(
            f"{origin.reference} has more pieces than the seed, and {before.reference} does not "
            "have these; start from another version, or from the seed"
        )
    return origin.reference


def _settings(run: Run, before: Expert) -> dict[str, int | float | str | None] | None:
    """Settings of the version after another: those of that one, but for what the RUN is given."""
    part = "grow" if before.cluster is None else "experts"
    given = own_settings(run.config, run.settings, part)
    # A version that languages joined was trained with those of `grow`.
    others = ("grow.", "donor_share", "kept_share") if part == "experts" else ()
    kept = {name: v for name, v in (before.settings or {}).items() if not name.startswith(others)}
    tokens, passes = f"{part}.tokens", f"{part}.passes"
    if before.cluster is not None and not {tokens, passes} & set(kept):
        # Of the first version these were those of all experts together.
        kept[tokens] = expert_job(replace(run, settings=()), before).config.tokens
        kept |= {} if run.config.experts.passes is None else {passes: None}
    if passes in given:
        kept.pop(tokens, None)
    elif tokens in given:
        kept.pop(passes, None)
        if getattr(replace(run, settings=()).config, part).passes is not None:
            kept[passes] = None
    return {**kept, **given} or None


def _contents(corpus: AnyCorpus, languages: Sequence[str]) -> Contents:
    """Contents of a corpus in those of these languages that it has; UserError if it has none."""
    found, errors = [], []
    for tag in languages:
        try:
            contents_in(corpus, [tag])
            found.append(tag)
        except UserError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return contents_in(corpus, found)


def _refuse_left_behind(run: Run, name: str, text: str) -> None:
    """Raises UserError if an earlier call ended before its version was in the registry, and this
    one has no corpus: it would go on without that text."""
    corpus = run.directory / "corpus"
    if (corpus / text).exists() or (corpus / f".{text}.partial").exists():
        raise UserError(
            f"{corpus / text} was tokenised for a version of {name} that has not begun; give its "
            f"--corpus again, or delete it with: xelm discard {run.directory} {name}"
        )
