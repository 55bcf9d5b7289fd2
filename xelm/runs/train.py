"""`xelm train`: the experts of clusters, and the dense baseline at equal compute."""

import functools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from clustering.errors import UserError
from experts import manifest
from experts.expert import SEED, Expert
from experts.lock import locked, record
from xelm.models.checkpoint import load_parameters, read_config
from xelm.models.config import ModelConfig
from xelm.models.vocabulary_rows import resized
from xelm.runs.budget import Plan, announce, check_disk, plan
from xelm.runs.check import check_models
from xelm.runs.jobs import Job, command_of, dense_job, expert_job, made_elsewhere, part_of
from xelm.runs.publish import publish, write_centre, write_expert_adapter, write_model
from xelm.runs.run import Run
from xelm.runs.shares import parent_directory
from xelm.runs.vocabulary import write_start
from xelm.training import hosts
from xelm.training.loop import train_together
from xelm.training.trainer import TrainingSpec


def train_experts(run: Run, names: Sequence[str]) -> None:
    """Trains and publishes the named experts, `experts.runtime.mesh_expert` of them at a time in
    one program; published ones are left alone. Raises the first fault once all were tried."""
    for error in try_experts(run, names).values():
        raise error


def try_experts(
    run: Run, names: Sequence[str], *, wait_seconds: float = 1.0
) -> dict[str, UserError]:
    """As `train_experts`, but returns why experts failed, by name. wait_seconds: how long to wait
    for another process that is training one of them."""
    plans = plans_of(run, names, estimate=False)
    together, failures = run.config.experts.runtime.mesh_expert, {}
    hosts.first_does(functools.partial(check_disk, run.directory, plans, together=together))
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
    """Costs of training the dense baseline and the named experts, as far as they are not trained.
    estimate: as in `budget.plan`."""
    registry = run.registry()
    unfinished = {expert.name: expert for expert in registry.training()}
    experts = [unfinished.get(name) or registry.expert(name) for name in names]
    jobs = [dense_job(run)] if dense and not run.dense.exists() else []
    jobs += [_job(run, expert) for expert in experts if expert.status == "training"]
    return plans_of_jobs(run, jobs, estimate=estimate)


def plans_of_jobs(
    run: Run, jobs: Sequence[Job], *, estimate: bool = True, model: ModelConfig | None = None
) -> list[Plan]:
    """Cost of each job. model: shape of the models but for further pieces; None: the seed's."""
    model = model or read_config(run.seed)
    found = []
    for job in jobs:
        shape = resized(model, model.vocabulary_size + job.pieces)
        facts = (job.name, job.part, job.text.sources, job.config, shape)
        found.append(plan(run, *facts, estimate=estimate))
    return found


def _train_group(run: Run, names: Sequence[str], wait_seconds: float) -> dict[str, UserError]:
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(_held(run, name, wait_seconds))
        experts = [expert for expert in run.registry().training() if expert.name in names]
        try:
            jobs = [_job(run, expert) for expert in experts]
            hosts.first_does(functools.partial(announce, plans_of_jobs(run, jobs)))
            hosts.first_does(functools.partial(_record_beginning, run, experts))
            failures = train_checkpoints(run, jobs)
            for expert in experts:
                if expert.name not in failures:
                    try:
                        hosts.first_does(functools.partial(publish, run, expert))
                    except UserError as error:
                        failures[expert.name] = error
        except UserError as error:
            if hosts.several() and not isinstance(error, hosts.SharedError):
                raise
            failures = dict.fromkeys(names, error)
        for name, error in failures.items() if hosts.is_first() else ():
            run.training(name).parent.mkdir(exist_ok=True)
            run.failure(name).write_text(str(error), encoding="utf-8")
    return failures


def _record_beginning(run: Run, experts: Sequence[Expert]) -> None:
    """Records in the history that trainings begin, but for those that are resumed."""
    begun = [
        expert.reference
        for expert in experts
        if not expert.directory(run.directory).exists() and not run.training(expert.name).exists()
    ]
    if begun:
        record(run.directory, "train", begun)


def _record_dense(run: Run) -> None:
    """Records in the history that the dense baseline was trained, unless it says so."""
    facts = {"model": run.dense.name}
    if all(event.facts != facts for event in run.registry().history):
        record(run.directory, "train", (), facts)


@contextmanager
def _held(run: Run, name: str, wait_seconds: float = 0.0) -> Iterator[None]:
    """The lock of a training, which the first host acquires for all hosts."""
    with ExitStack() as stack:
        lock = locked(run.directory, f"train-{name}", wait_seconds=wait_seconds)
        hosts.first_does(lambda: stack.enter_context(lock))
        yield
        hosts.wait_for_all(f"{name} is written")


def _job(run: Run, expert: Expert) -> Job:
    if expert.made is not None:
        raise made_elsewhere(run, expert)
    if part_of(expert) == "grow":
        command = command_of(run, expert)
        raise UserError(f"{expert.name} is a grown expert; resume its training with: {command}")
    if expert.awaits:
        command = command_of(run, expert)
        raise UserError(f"{expert.name} is to start from {expert.awaits}; go on with: {command}")
    return expert_job(run, expert)


def finish(run: Run, expert: Expert, job: Job) -> Expert:
    """Trains an expert that is in the registry, or resumes its training, and publishes it; returns
    its new record."""
    plans = plans_of_jobs(run, [job])
    announce(plans)
    check_disk(run.directory, plans)
    if not job.target.exists():
        parent = parent_directory(run, expert)
        check_parents(run, [parent])
        if job.parent != parent:
            write_start(run, expert, parent, job.text.sources)
    for error in train_checkpoints(run, [job]).values():
        raise error
    return publish(run, expert)


def train_dense(run: Run) -> None:
    """Trains the baseline: the seed, on all languages, for the tokens of all experts together."""
    job = dense_job(run)
    plans = plans_of_jobs(run, [] if run.dense.exists() else [job])
    hosts.first_does(functools.partial(check_disk, run.directory, plans))
    with _held(run, "dense"):
        hosts.first_does(functools.partial(announce, plans))
        before = run.dense.exists()
        for error in train_checkpoints(run, [job]).values():
            raise error
        hosts.first_does(lambda: manifest.record(run.directory, ["dense"], again=not before))
        hosts.first_does(functools.partial(_record_dense, run))


def train_checkpoints(run: Run, jobs: Sequence[Job]) -> dict[str, UserError]:
    """Trains several jobs in one program and writes their checkpoints; jobs whose checkpoint exists
    are skipped. Returns why jobs failed, by name."""
    for job in jobs if hosts.is_first() else ():
        run.failure(job.name).unlink(missing_ok=True)
        if job.target.exists():
            shutil.rmtree(run.training(job.name), ignore_errors=True)
    jobs = [job for job in jobs if not job.target.exists()]
    if not jobs:
        return {}
    hosts.first_does(functools.partial(check_parents, run, [job.parent for job in jobs]))
    model = read_config(jobs[0].parent)
    trainings = [
        TrainingSpec(
            label=job.name,
            start=functools.partial(load_parameters, job.parent, model),
            sources=job.text.sources,
            held_out=job.text.held_out,
            config=job.config,
            directory=run.training(job.name),
            logs=run.logs(job.target),
        )
        for job in jobs
    ]
    failures = {}
    for job, found in zip(jobs, train_together(trainings, model, run.tokenizer().text_format)):
        if isinstance(found, UserError):
            failures[job.name] = found
            continue
        hosts.first_does(functools.partial(write_centre, run, job.name, job.own.sources))
        with hosts.first_error_shared():
            if job.config.lora.rank is not None:
                write_expert_adapter(run, job, found.parameters, hosts.is_first())
                continue
            same = model == read_config(run.seed)
            like = run.seed if same else job.parent
            frozen = same and job.config.frozen_layers is not None
            write_model(
                run,
                job.name,
                job.target,
                model,
                found.parameters,
                hosts.is_first(),
                like=like,
                base=job.parent if frozen else None,
            )
    return failures


def check_parents(run: Run, parents: Iterable[Path]) -> None:
    """Raises UserError unless these checkpoints, of experts or the seed, are as published, with
    finite weights."""
    parents = set(parents)
    experts = [e for e in run.registry().experts if e.directory(run.directory) in parents]
    check_models(run, experts, {SEED: run.seed} if run.seed in parents else None)
