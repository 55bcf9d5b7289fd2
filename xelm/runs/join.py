"""`xelm grow --into`: languages join an expert, with its next version; no other expert changes."""

from collections.abc import Mapping, Sequence

from clustering.errors import UserError
from experts.begin import begin
from experts.expert import Expert
from experts.grow import refuse_served
from experts.lock import locked, update
from xelm.data.contents import contents_in, contents_of
from xelm.data.corpus import AnyCorpus, Corpus
from xelm.data.store import Store
from xelm.runs import train
from xelm.runs.jobs import already_begun, command_of, expert_job, other_settings
from xelm.runs.language import check_language
from xelm.runs.options import GrowOptions
from xelm.runs.run import Run
from xelm.runs.shares import as_recorded, parent_directory, unused_text
from xelm.runs.text import tokenise
from xelm.runs.vocabulary import add_pieces
from xelm.settings import own_settings


def join(
    run: Run, name: str, tags: Sequence[str], corpus: AnyCorpus | None, options: GrowOptions
) -> Expert:
    """Trains and publishes the next version of an expert, which serves further languages, or
    resumes its training.

    It starts from the version in use, and is trained as a grown expert is: for `grow.tokens`, with
    `kept_share` of its own rows in its former languages. tags, corpus: the languages that join, and
    text in them; None takes that of the RUN. UserError for an expert that is not in use, for the
    cluster of documents, and for a training that began with other arguments.
    """
    with locked(run.directory, f"train-{name}"):
        run, expert, _ = prepared(run, name, tags, corpus, options, run)
        job = expert_job(run, expert)
        update(run.directory, lambda registry: begin(registry, expert), "join")
        return train.finish(run, expert, job)


def prepared(
    run: Run,
    name: str,
    tags: Sequence[str],
    corpus: AnyCorpus | None,
    options: GrowOptions,
    place: Run,
) -> tuple[Run, Expert, Mapping[str, Store]]:
    """The RUN with the settings of the training, the version, which is not in the registry where
    its training is to begin, and the text of the languages by name, which is tokenised in `place`
    then. UserError for what cannot be trained, before it costs anything."""
    registry = run.registry()
    registry.versions(name)  # refuses an unknown one
    if begun := registry.unfinished(name):
        return _resumed(run, begun, tags, corpus)
    before = registry.in_use(name)
    for tag in tags:
        refuse_served(registry, tag)
    if before.documents is not None:
        raise UserError(
            f"{name} is the expert of a cluster of documents, which no language joins; grow "
            f"{' '.join(tags)} without --into"
        )
    text = unused_text(registry, f"{name}-v{registry.next_version(name)}")
    own = before.texts[before.cluster is not None :]
    joined = " ".join(tags)
    registry = registry.start(
        name,
        parent=before.reference,
        languages=(*before.languages, *tags),
        joined=tuple(tags),
        corpora=(*own, text),
        reason=f"{joined} joined {before.reference}",
        settings=own_settings(run.config, run.settings, "grow") or None,
    )
    expert = registry.experts[-1]
    train.check_parents(run, [parent_directory(run, expert)])
    contents = contents_in(corpus or run.record["corpus"], tags)
    store = tokenise(place, contents, text, workers=options.workers)
    check_language(run, store)
    add_pieces(run, expert, [store], contents, workers=options.workers)
    return run, expert, {text: store}


def _resumed(
    run: Run, begun: Expert, tags: Sequence[str], corpus: AnyCorpus | None
) -> tuple[Run, Expert, Mapping[str, Store]]:
    """The same for a version whose training has begun; UserError for other languages, another
    corpus or another setting than it began with."""
    other = None
    if set(begun.joined or ()) != set(tags):
        other = f"; go on with: {command_of(run, begun)}"
    else:
        store = run.store(begun.texts[-1])
        wanted = corpus and contents_of(corpus, list(tags)).fingerprint()
        if wanted not in (None, store.record["corpus_sha256"]):
            other = f", on {Corpus.of(store.record['corpus'])}; go on without --corpus"
        elif found := other_settings(run, begun):
            other = f", {found}. Go on without it"
    if other:
        raise already_begun(run, begun, other)
    return as_recorded(run, begun), begun, {}
