"""`xelm distil`: the ensemble as the teacher of one student, which starts from the seed and reads
what the dense baseline reads.

The teacher reads each document of that text once, before the training; its likeliest tokens are
written in the training's folder, from where they are read with the rows. That is not slower than to
have the experts read each batch: a text that is passed over several times is read once, in whole
documents, and only the experts with weight read it. A student is a model for all languages, in
RUN/students/NAME.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clustering.errors import UserError
from clustering.files import read_json, write_json
from experts.expert import Expert
from experts.manifest import STUDENTS, digest
from xelm.data.rows import LanguageShare, documents_read
from xelm.data.teacher import TeacherStore, bytes_of
from xelm.inference.routing import Routing
from xelm.inference.teaching import teach, tokens_at_once
from xelm.models.checkpoint import read_config
from xelm.progress import bar
from xelm.runs import train
from xelm.runs.budget import Plan, announce, check_disk, size
from xelm.runs.combined import RECIPE, begin, check_model_name, join, making
from xelm.runs.ensembles import open_ensemble, published
from xelm.runs.jobs import Job, dense_job
from xelm.runs.options import DistilOptions
from xelm.runs.run import Run
from xelm.settings import to_json

_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """What a distillation does, before it begins."""

    job: Job
    """Training of the student, without the teacher's predictions."""
    store: TeacherStore
    """Place of these."""
    documents: Sequence[tuple[np.ndarray, np.ndarray]]
    """For each source, numbers of the documents that the teacher reads, and their targets."""
    recipe: dict[str, Any]
    """Contents of recipe.json."""


def distil(
    run: Run,
    name: str = "student",
    options: DistilOptions | None = None,
    routing: Routing | None = None,
) -> Path:
    """Trains a student of the ensemble, or goes on with one that was interrupted; returns its
    checkpoint, RUN/students/`name`.

    It starts from the seed and reads the rows of the dense baseline, in the same order, with the
    same settings; how many is the RUN's `experts.tokens`, or is set for this command. Of its
    measurements on held-out text the best is kept. routing: how the teacher weighs its experts;
    None: the default. UserError for encoders, for a student that exists, or began otherwise."""
    options, routing = options or DistilOptions(), routing or Routing()
    place = f"{STUDENTS}/{name}"
    _check(run, name)
    with making(run, place):
        experts = published(run)
        found = _prepared(run, place, experts, options, routing)
        if not found.job.target.exists():
            plan = _plan(run, found)
            announce([plan])
            check_disk(run.directory, [plan])
            begin(run, place, found.recipe)
            _teach(run, found, experts, routing)
            for error in train.train_checkpoints(run, [_with_teacher(found, options)]).values():
                raise error
        join(run, place, found.job.text.sources, _introduction(found.recipe), "distil")
    return found.job.target


def plan_distil(
    run: Run,
    name: str = "student",
    options: DistilOptions | None = None,
    routing: Routing | None = None,
) -> Plan:
    """What `distil` would cost with these arguments; nothing is written."""
    place = f"{STUDENTS}/{name}"
    _check(run, name)
    prepared = _prepared(
        run, place, published(run), options or DistilOptions(), routing or Routing()
    )
    plan = _plan(run, prepared)
    check_disk(run.directory, [plan])
    return plan


def _check(run: Run, name: str) -> None:
    """Raises UserError for a name that no student can have, and for encoders."""
    check_model_name(name, "student")
    if not read_config(run.seed).causal:
        raise UserError(
            f"{run.directory} has encoders, whose predictions depend on the masks of each batch; "
            "distil is for models that continue text"
        )


def _prepared(
    run: Run, place: str, experts: Sequence[Expert], options: DistilOptions, routing: Routing
) -> Distillation:
    job, vocabulary_size = dense_job(run), read_config(run.seed).vocabulary_size
    if options.top > vocabulary_size:
        raise UserError(f"top must be at most {vocabulary_size}, the vocabulary; got {options.top}")
    job = replace(job, name=place, target=run.directory / place)
    sources = job.text.sources
    total, rows = sum(s.share for s in sources), job.config.steps * job.config.batch_size
    documents = []
    for source in sources:
        # Some more than its share, as it may be ahead of it at any time (see `rows.batches`).
        count = int(rows * source.share / total) + len(sources) + 1
        numbers = documents_read(source, count, job.config, run.tokenizer().text_format)
        documents.append((numbers, source.ids.lengths[numbers] + 1))
    targets = sum(int(counts.sum()) for _, counts in documents)
    recipe = {
        "format": _FORMAT,
        "method": "distil",
        "made_of": [expert.reference for expert in experts],
        "records": {e.reference: digest(e, run.registry()) for e in experts},
        "routing": {k: v for k, v in asdict(routing).items() if v not in (None, {})},
        **asdict(options),
        "targets": targets,
        "parent": "seed",
        "config": to_json(job.config),
    }
    folder = run.training(place) / "teacher"
    store = TeacherStore(folder, targets=targets, top=options.top, vocabulary_size=vocabulary_size)
    return Distillation(job=job, store=store, documents=documents, recipe=recipe)


def _plan(run: Run, found: Distillation) -> Plan:
    (plan,) = train.plans_of_jobs(run, [found.job])
    vocabulary_size = read_config(run.seed).vocabulary_size
    left = found.store.targets - found.store.written
    return replace(plan, teacher_bytes=bytes_of(left, found.store.top, vocabulary_size))


def _teach(run: Run, found: Distillation, experts: Sequence[Expert], routing: Routing) -> None:
    """Writes what the teacher predicts, from where it was interrupted."""
    store = found.store
    if store.complete:
        _record_cost(run, found)
        return
    ensemble = open_ensemble(run, routing, experts=experts)
    size_of = size(bytes_of(store.targets, store.top, ensemble.model.vocabulary_size))
    print(
        f"{found.job.name}: the teacher reads {store.targets:,} tokens; its {store.top} likeliest "
        f"at each take {size_of} until the student is trained",
        file=sys.stderr,
    )
    first = 0
    with store.writing() as writer, bar(store.targets, "teacher", "tok") as progress:
        progress.update(writer.written)
        for source, (numbers, counts) in zip(found.job.text.sources, found.documents):
            ends = first + np.cumsum(counts)
            language = source.ids.language if routing.name == "language" else None
            # In the same parts after an interruption, as their sizes decide how sums are rounded.
            for part in _parts(counts, tokens_at_once(ensemble)):
                left = numbers[part][ends[part] > writer.written]
                if not len(left):
                    continue
                documents = [source.ids.document(int(number)) for number in left]
                lesson = teach(ensemble, documents, store.top, language)
                before = writer.written
                for one in lesson.predictions:
                    writer.append(one.ids, one.log_probabilities)
                writer.save(lesson.tokens_read)
                progress.update(writer.written - before)
            first += int(counts.sum())
    _record_cost(run, found)


def _record_cost(run: Run, found: Distillation) -> None:
    path = run.training(found.job.name) / RECIPE
    write_json(path, read_json(path) | {"teacher_tokens_read": found.store.tokens_read})


def _parts(counts: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Indices of documents with so many targets each, in parts of about so many tokens."""
    at = np.cumsum(counts) // tokens
    places = np.arange(len(counts))
    return np.split(places, np.flatnonzero(np.diff(at)) + 1) if len(counts) else []


def _with_teacher(found: Distillation, options: DistilOptions) -> Job:
    """The training of the student, with the teacher's predictions beside its text."""
    texts = found.store.open(found.documents, options.teacher_share)
    sources: list[LanguageShare] = [
        replace(source, teacher=teacher)
        for source, teacher in zip(found.job.text.sources, texts, strict=True)
    ]
    return replace(found.job, text=replace(found.job.text, sources=sources))


def _introduction(recipe: dict[str, Any]) -> str:
    return (
        "A student of an ensemble of cross-lingual experts (X-ELM, [Blevins et al. 2024]"
        f"(https://arxiv.org/abs/2401.10440)): it was trained from the seed to predict what "
        f"{len(recipe['made_of'])} experts predict together. It is one model for all languages, of "
        "the size of one expert."
    )
