"""`xelm branch` and `xelm train`: experts of clusters, and the dense baseline at equal compute."""

import functools
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clustering.clustering import Clustering
from clustering.documents import Documents
from clustering.engines import Engine
from clustering.errors import UserError
from clustering.files import read_arrays, sha256, write_arrays
from clustering.files import replace as replace_file
from clustering.languages import canonical_all
from experts import manifest
from experts.branch import branch as branch_registry
from experts.card import card
from experts.expert import SEED, Expert, parse_reference
from experts.lock import locked, update
from experts.registry import Registry
from experts.verify import hash_directory
from xelm.config import TrainConfig
from xelm.data.rows import LanguageShare, sampling_shares
from xelm.data.store import TokenizedLanguage
from xelm.data.text_format import TextFormat
from xelm.models.checkpoint import (
    README,
    load_parameters,
    read_config,
    stored_dtype,
    write_checkpoint,
)
from xelm.models.config import ModelConfig
from xelm.runs.budget import Plan, announce, check_disk, plan
from xelm.runs.checking import check_models
from xelm.runs.origin import origin_facts
from xelm.runs.run import Run
from xelm.training.hosts import (
    SharedError,
    first_does,
    first_writes,
    is_first,
    several,
    wait_for_all,
)
from xelm.training.loop import train_together
from xelm.training.metrics import read_metrics
from xelm.training.trainer import TrainingSpec

CENTRE = "centre.npz"
# Documents a centre is the mean of, at most: more do not move it.
CENTRE_DOCUMENTS = 2000


def branch(run: Run, clustering: Clustering) -> Registry:
    """Records one expert in training for each cluster, and the clustering in the RUN. Languages of
    the corpus in no cluster are refused unless the clustering says that they are unassigned."""
    check_languages(run.languages, clustering)
    vectoriser = clustering.vectoriser
    if vectoriser is not None and vectoriser != run.vectoriser():
        raise UserError(
            "these clusters of documents were made with other vectors than the RUN's; make them by "
            f"xelm cluster --method tfidf --run {run.directory}"
        )
    branched = (run.directory / "clusters.json").exists()
    trained = run.dense.exists() or run.training("dense").exists()
    if clustering.unassigned and trained and not branched:
        raise UserError(
            f"these clusters leave out {', '.join(clustering.unassigned)}, on which the dense "
            "baseline was trained; make another RUN without those languages"
        )
    with locked(run.directory, "branch"):
        registry = update(run.directory, lambda registry: branch_registry(registry, clustering))
        if not branched:
            clustering.save(run.directory)
        if clustering.of_documents:
            _assign_documents(run, clustering)
        written = ["clusters.json", "clusters.npz", "assignments.npz"]
        manifest.record(run.directory, written, again=not branched)
    return registry


def check_languages(languages: Sequence[str], clustering: Clustering) -> None:
    """Raises UserError unless the clusters are of these languages."""
    missing = set(languages) - set(clustering.languages) - set(clustering.unassigned)
    unknown = set(clustering.languages) - set(languages)
    if missing or unknown:
        where = [f"not in the clusters: {', '.join(sorted(missing))}"] if missing else []
        where += [f"not in the RUN: {', '.join(sorted(unknown))}"] if unknown else []
        raise UserError(
            f"clusters and RUN have different languages ({'; '.join(where)}); cluster those of the "
            "corpus (cluster --corpus), or take fewer of them (init --languages)"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A checkpoint that is to be trained from another."""

    name: str
    part: str
    """Of the configuration: experts, dense or grow."""
    parent: Path
    target: Path
    sources: Sequence[LanguageShare]
    config: TrainConfig


def train_experts(run: Run, names: Sequence[str]) -> None:
    """Trains and publishes the named experts, `experts.runtime.mesh_expert` of them at a time in
    one program; published ones are left alone. Raises the first fault once all were tried."""
    for error in try_experts(run, names).values():
        raise error


def try_experts(
    run: Run, names: Sequence[str], *, wait_seconds: float = 1.0
) -> dict[str, UserError]:
    """The same, but returns why experts failed, by name. wait_seconds: for somebody else who trains
    one of them."""
    plans = plans_of(run, names)
    together, failures = run.config.experts.runtime.mesh_expert, {}
    first_does(functools.partial(check_disk, run.directory, plans, together=together))
    for first in range(0, len(names), together):
        group = names[first : first + together]
        try:
            failures |= _train_group(run, group, wait_seconds)
        except UserError as error:
            failures |= dict.fromkeys(group, error)
    return failures


def plans_of(
    run: Run, names: Sequence[str] = (), *, dense: bool = False, estimate: bool = True
) -> list[Plan]:
    """What the trainings of the dense baseline and of the named experts cost, but for those that
    are done. estimate: as in `budget.plan`."""
    experts = [run.registry().expert(name) for name in names]
    jobs = [_dense_job(run)] if dense and not run.dense.exists() else []
    jobs += [_job(run, expert) for expert in experts if expert.status == "training"]
    return plans_of_jobs(run, jobs, estimate=estimate)


def plans_of_jobs(run: Run, jobs: Sequence[Job], *, estimate: bool = True) -> list[Plan]:
    """What jobs cost."""
    model = read_config(run.seed) if jobs else None
    return [
        plan(run, job.name, job.part, job.sources, job.config, model, estimate=estimate)
        for job in jobs
        if model is not None
    ]


def _train_group(run: Run, names: Sequence[str], wait_seconds: float) -> dict[str, UserError]:
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(_held(run, name, wait_seconds))
        experts = [expert for expert in run.registry().training() if expert.name in names]
        try:
            jobs = [_job(run, expert) for expert in experts]
            plans = plans_of_jobs(run, jobs)
            first_does(functools.partial(announce, plans))
            failures = train_checkpoints(run, jobs)
            for expert, job in zip(experts, jobs):
                if expert.name not in failures:
                    share = sum(source.share for source in job.sources)
                    facts = {"share of the total tokens": f"{share:.4f}"}
                    first_does(functools.partial(publish, run, expert, facts))
        except UserError as error:
            if several() and not isinstance(error, SharedError):
                raise
            failures = dict.fromkeys(names, error)
        for name, error in failures.items() if is_first() else ():
            run.training(name).parent.mkdir(exist_ok=True)
            run.failure(name).write_text(str(error), encoding="utf-8")
    return failures


@contextmanager
def _held(run: Run, name: str, wait_seconds: float = 0.0) -> Iterator[None]:
    """The lock of a training, which the first host holds for all of them."""
    with ExitStack() as stack:
        lock = locked(run.directory, f"train-{name}", wait_seconds=wait_seconds)
        first_does(lambda: stack.enter_context(lock))
        yield
        wait_for_all(f"{name} is written")


def _job(run: Run, expert: Expert) -> Job:
    if expert.cluster is None:
        raise UserError(f"{expert.name} was grown; go on with: xelm grow --language {expert.name}")
    sources, config = cluster_sources(run, expert.cluster), run.config.experts
    share = sum(source.share for source in sources)
    return Job(
        name=expert.name,
        part="experts",
        parent=parent_directory(run, expert),
        target=expert.directory(run.directory),
        sources=sources,
        config=replace(config, tokens=max(1, round(config.tokens * share))),
    )


def train_dense(run: Run) -> None:
    """Trains the baseline: the seed, on all languages, for the tokens of all experts together."""
    job, plans = _dense_job(run), plans_of(run, dense=True)
    first_does(functools.partial(check_disk, run.directory, plans))
    with _held(run, "dense"):
        first_does(functools.partial(announce, plans))
        before = run.dense.exists()
        for error in train_checkpoints(run, [job]).values():
            raise error
        first_does(lambda: manifest.record(run.directory, ["dense"], again=not before))


def _dense_job(run: Run) -> Job:
    return Job(
        name="dense",
        part="dense",
        parent=run.seed,
        target=run.dense,
        sources=dense_sources(run),
        config=run.config.dense,
    )


def dense_sources(run: Run) -> list[LanguageShare]:
    """All documents, languages in their shares."""
    store, shares = run.store(), language_shares(run)
    return [LanguageShare(ids=store.languages[tag], share=share) for tag, share in shares.items()]


def language_shares(run: Run) -> dict[str, float]:
    """Share of each language in the tokens of all experts together, and in those of the dense
    baseline: every language is seen as often in both, so that they differ in who sees it.
    Languages that the RUN's clusters leave unassigned have none."""
    branched = (run.directory / "clusters.json").exists()
    left_out = run.clusters().unassigned if branched else ()
    stores = run.store().languages.items()
    return shares_of(run.config.experts, {tag: ids for tag, ids in stores if tag not in left_out})


def shares_of(config: TrainConfig, languages: Mapping[str, TokenizedLanguage]) -> dict[str, float]:
    """Of each language in a training, as its settings say."""
    return sampling_shares(
        {tag: len(ids.ids) for tag, ids in languages.items()},
        config.data.sampling_exponent,
        budget=config.tokens,
        max_passes=config.max_passes,
    )


def cluster_sources(run: Run, cluster: str) -> list[LanguageShare]:
    """The documents of one cluster. Their shares are parts of `language_shares`, so they sum to
    the cluster's part of the whole budget."""
    clustering, store, shares = run.clusters(), run.store(), language_shares(run)
    if not clustering.of_documents:
        return [
            LanguageShare(ids=store.languages[tag], share=shares[tag])
            for tag in clustering.clusters[cluster]
        ]
    labels = read_arrays(run.directory / "assignments.npz")
    index, sources = list(clustering.clusters).index(cluster), []
    for tag, ids in store.languages.items():
        documents = np.flatnonzero(labels[tag] == index)
        # A document counts by its tokens and the two that frame it, as in the packed rows.
        part = (ids.lengths[documents] + 2).sum() / (ids.lengths + 2).sum()
        if len(documents):
            sources.append(LanguageShare(ids=ids, share=shares[tag] * part, documents=documents))
    return sources


def documents_of(
    run: Run, languages: Sequence[str] | None = None, engine: Engine = map
) -> Documents:
    """Those of the RUN's corpus in these languages, or in all."""
    store = run.store()
    wanted = None if languages is None else canonical_all(languages)
    return Documents(store.parts(store.tags(wanted)), engine=engine)


def train_checkpoints(run: Run, jobs: Sequence[Job]) -> dict[str, UserError]:
    """Trains in one program, each job from one checkpoint to another, which appears whole; those
    that are there already are left. Returns why jobs were given up, by name."""
    for job in jobs if is_first() else ():
        run.failure(job.name).unlink(missing_ok=True)
        if job.target.exists():
            shutil.rmtree(run.training(job.name), ignore_errors=True)
    jobs = [job for job in jobs if not job.target.exists()]
    if not jobs:
        return {}
    first_does(functools.partial(check_parents, run, [job.parent for job in jobs]))
    model = read_config(jobs[0].parent)
    trainings = [
        TrainingSpec(
            label=job.name,
            start=functools.partial(load_parameters, job.parent, model),
            sources=job.sources,
            config=job.config,
            directory=run.training(job.name),
            logs=run.logs(job.target),
        )
        for job in jobs
    ]
    failures = {}
    for job, found in zip(jobs, train_together(trainings, model, text_format(run, model))):
        if isinstance(found, UserError):
            failures[job.name] = found
            continue
        first_does(functools.partial(_write_centre, run, job))
        first_writes(functools.partial(_write, run, job, model, found.parameters))
    return failures


def check_parents(run: Run, parents: Iterable[Path]) -> None:
    """Raises UserError unless these checkpoints, of experts or the seed, are what was published,
    and hold numbers."""
    parents = set(parents)
    experts = [e for e in run.registry().experts if e.directory(run.directory) in parents]
    check_models(run, experts, {SEED: run.seed} if run.seed in parents else None)


def _write_centre(run: Run, job: Job) -> None:
    write_arrays(run.training(job.name) / CENTRE, {"centre": _centre(run, job.sources)})


def _write(
    run: Run, job: Job, model: ModelConfig, parameters: Mapping[str, Any], writes: bool
) -> None:
    """Writes what was trained, rounded to the dtype of the seed's weights unless another is set."""
    work, dtype = run.training(job.name), run.config.weights_dtype
    write_checkpoint(
        job.target,
        model,
        parameters,
        like=run.seed,
        extra=[work / "metrics.jsonl", work / CENTRE],
        dtype=stored_dtype(run.seed) if dtype == "seed" else dtype,
        writes=writes,
    )
    if writes:
        shutil.rmtree(work, ignore_errors=True)


def text_format(run: Run, model: ModelConfig) -> TextFormat:
    """How rows are made of the RUN's documents."""
    tokenizer = run.tokenizer()
    return TextFormat(
        start_id=tokenizer.start_id,
        end_id=tokenizer.end_id,
        masking=None if model.causal else tokenizer.masking(),
    )


def publish(run: Run, expert: Expert, facts: Mapping[str, str | int | float]) -> None:
    """Adds the card to a trained expert's files and publishes it under their hashes, of which the
    card states those of the other files and the registry its own as well."""
    directory = expert.directory(run.directory)
    tokens = read_metrics(directory / "metrics.jsonl")[-1]["tokens"]
    text = directory / README
    text.unlink(missing_ok=True)  # of a publication that was interrupted
    files = hash_directory(directory)
    described = replace(expert, sha256=files, tokens=tokens)
    masked = not read_config(run.seed).causal
    if run.settings:
        facts = {**facts, "set for its training": " ".join(run.settings)}
    facts = {**origin_facts(run), **facts}
    page = card(described, run.registry(), facts, masked=masked)
    replace_file(text, lambda file: file.write(page.encode()))
    files[README] = sha256(text)
    # First, so that nothing is published without: `verify` compares the record with it.
    manifest.record_expert(run.directory, replace(described, sha256=files))
    update(
        run.directory,
        lambda registry: registry.publish(expert.name, expert.version, sha256=files, tokens=tokens),
    )


def parent_directory(run: Run, expert: Expert) -> Path:
    """The checkpoint that an expert starts from."""
    if expert.parent == SEED:
        return run.seed
    return run.registry().expert(*parse_reference(expert.parent)).directory(run.directory)


def _centre(run: Run, sources: Sequence[LanguageShare]) -> np.ndarray:
    """Where an expert's documents lie on average, [D]: languages weigh as in its training."""
    vectoriser = run.vectoriser()
    total = sum(source.share for source in sources)
    centre = np.zeros(vectoriser.dimensions)
    for source in sources:
        numbers = np.arange(len(source.ids)) if source.documents is None else source.documents
        step = -(-len(numbers) // CENTRE_DOCUMENTS)
        documents = (source.ids.document(int(number)) for number in numbers[::step])
        centre += source.share / total * vectoriser.transform(documents).mean(axis=0)
    return centre.astype(np.float32)


def _assign_documents(run: Run, clustering: Clustering) -> None:
    """Writes the cluster of every document: assignments.npz, language -> int32 [documents]."""
    path = run.directory / "assignments.npz"
    if path.exists():
        return
    documents = {
        tag: (ids.document(number) for number in range(len(ids)))
        for tag, ids in run.store().languages.items()
    }
    write_arrays(path, {tag: clustering.assign(found) for tag, found in documents.items()})
