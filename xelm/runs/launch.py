"""Training experts apart from this process: several processes in parallel, or tasks of Ray.

Each expert (or each `experts.runtime.mesh_expert` of them, which share a program) is a job of its
own that starts, ends and fails apart from the others. Every way returns why experts failed, by
name.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from clustering.engines import connect
from clustering.errors import UserError
from xelm.runs.budget import announce, check_disk
from xelm.runs.options import LaunchOptions
from xelm.runs.run import Run, open_run
from xelm.runs.status import progress
from xelm.runs.train import plans_of, train_dense, try_experts
from xelm.training.preemption import Preempted

RETRIES = 3
"""Number of retries of a job that was killed or terminated without a new checkpoint."""
_LOCK_SECONDS = 60.0
"""Wait until the process of a lost machine has released the lock of its expert."""


def launch(
    run: Run,
    names: Sequence[str],
    options: LaunchOptions | None = None,
    *,
    dense: bool = False,
) -> dict[str, str]:
    """Trains the dense baseline if `dense`, then experts; returns why experts failed, by name. A
    single job on this machine trains in this process."""
    options = options or LaunchOptions()
    apart = options.engine == "ray" or options.jobs > 1
    # Refuses what cannot be trained before dense is. Other processes log for themselves; this one
    # must not open a device to estimate their time.
    plans = plans_of(run, names, estimate=False)
    if dense and apart:
        _train_dense_apart(run)
    elif dense:
        train_dense(run)
    if not apart:
        return {name: str(error) for name, error in try_experts(run, names).items()}
    announce(plans)
    check_disk(run.directory, plans, together=options.jobs)
    size = run.config.experts.runtime.mesh_expert
    left = {expert.name for expert in run.registry().training()}
    names = [name for name in names if name in left]
    if not names:
        return {}
    waiting = [_Job(run, names[first : first + size]) for first in range(0, len(names), size)]
    if options.engine == "ray":
        devices = (options.devices or 1) * max(len(job.names) for job in waiting)
        return _train_over_ray(run, waiting, devices)
    return _train_in_processes(waiting, options.jobs)


class _Job:
    """Experts that are trained together, apart from this process, and how often that was begun."""

    def __init__(self, run: Run, names: Sequence[str]):
        self.run, self.names, self.label = run, list(names), ", ".join(names)
        self._steps, self._fruitless = self._saved_steps(), 0

    def _saved_steps(self) -> int:
        found = [each for each in progress(self.run) if each.name in self.names]
        return sum(e.step if e.state == "done" else e.checkpoint_step or 0 for e in found)

    def again(self) -> bool:
        """Whether a job that was stopped from outside is to be started again: unless it has ended
        more than `RETRIES` times in a row with nothing new saved."""
        before, self._steps = self._steps, self._saved_steps()
        self._fruitless = 0 if self._steps > before else self._fruitless + 1
        return self._fruitless <= RETRIES

    @property
    def log(self) -> Path:
        """Output of the job's process."""
        return self.run.training(self.names[0]).with_suffix(".log")

    def start(self, place: "_Place", mode: Literal["wb", "ab"]) -> subprocess.Popen:
        """Starts a process that trains the experts. mode: how its log is opened."""
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open(mode) as file:
            process = subprocess.Popen(
                [*_command(self.run), *self.names],
                env={**os.environ, **place.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        if place.cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, place.cores)
        return process

    def failures(self, code: int) -> dict[str, str]:
        """Reason of the failure of a process that ended with this code, by name of each expert that
        was not published before."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = lines[-1].removeprefix("xelm: ") if lines else f"it ended with code {code}"
        if code < 0:
            said = f"{self.label} was killed by signal {-code} repeatedly; see {self.log}"
        left = {expert.name for expert in self.run.registry().training()}
        kept = {name: self.run.failure(name) for name in self.names if name in left}
        return {n: p.read_text(encoding="utf-8") if p.exists() else said for n, p in kept.items()}


# Processes on this machine


def _command(run: Run) -> list[str]:
    settings = [text for setting in run.settings for text in ("--set", setting)]
    return [sys.executable, "-m", "xelm", "train", str(run.directory), *settings]


def _train_dense_apart(run: Run) -> None:
    """Trains the dense baseline in a process of its own, since this one must not occupy a device
    that later jobs need."""
    running: list[subprocess.Popen] = []
    with _ending(lambda: running):
        running.append(subprocess.Popen([*_command(run), "--dense"], stdout=subprocess.DEVNULL))
        code = running[0].wait()
    if code in (os.EX_TEMPFAIL, 130):
        by = signal.SIGTERM if code == os.EX_TEMPFAIL else signal.SIGINT
        raise Preempted(
            "dense was stopped by a signal; it is saved, and resumes when run again", by=by
        )
    if code:
        raise UserError(f"the dense baseline was not trained; its process ended with code {code}")


def _train_in_processes(waiting: list[_Job], jobs: int) -> dict[str, str]:
    """Trains so many jobs in parallel, each in a process with its share of this machine's GPUs (or
    cores, without GPUs). A process that was killed or terminated (exit code 75) is started
    again."""
    places = list(_places(min(jobs, len(waiting))))
    running: dict[int, tuple[_Job, subprocess.Popen]] = {}
    failures: dict[str, str] = {}
    with _ending(lambda: [process for _, process in running.values()]):
        while waiting or running:
            for place in set(range(len(places))) - set(running):
                if waiting:
                    job = waiting.pop(0)
                    running[place] = job, job.start(places[place], "wb")
                    print(f"{job.label}: begun; its log is {job.log}", file=sys.stderr)
            time.sleep(0.2)
            for place, (job, process) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[place]
                if code == 0:
                    print(f"{job.label}: done", file=sys.stderr)
                elif (code < 0 or code == os.EX_TEMPFAIL) and job.again():
                    print(f"{job.label}: ended ({code}), started again", file=sys.stderr)
                    running[place] = job, job.start(places[place], "ab")
                else:
                    failures |= job.failures(code)
                    print(f"{job.label}: failed", file=sys.stderr)
    return failures


class _Place(NamedTuple):
    """Part of this machine on which a process trains."""

    environment: Mapping[str, str]
    cores: Sequence[int]


def _places(jobs: int) -> Iterator[_Place]:
    """Equal parts of the GPUs or cores of this machine."""
    gpus = _gpus()
    if jobs > len(gpus) > 0:
        raise UserError(f"{jobs} jobs at a time want a GPU each; there are {len(gpus)}")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    each = max(1, len(gpus or cores) // jobs)
    for first in range(0, jobs * each, each):
        if gpus:
            yield _Place({"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + each])}, ())
        else:
            yield _Place({}, [cores[n % len(cores)] for n in range(first, first + each) if cores])


def _gpus() -> list[str]:
    """NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.split() if found.returncode == 0 else []


@contextmanager
def _ending(running: Callable[[], Sequence[subprocess.Popen]]) -> Iterator[None]:
    """Terminates the processes when the block ends for any reason; they save first. SIGTERM and
    Ctrl-C raise `Preempted`; a Ctrl-C in a terminal reaches the processes at the same time."""

    def terminate(number: int, frame: object) -> None:
        # Further signals are ignored while the processes save.
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Preempted(
            "stopped by a signal; what was trained is saved, and resumes when run again", by=number
        )

    before = {
        number: signal.signal(number, terminate) or signal.SIG_DFL
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for process in running():
            process.terminate()
        for process in running():
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


# Tasks on a cluster


def _train_over_ray(run: Run, waiting: Sequence[_Job], devices: int) -> dict[str, str]:
    """Trains on the Ray cluster at RAY_ADDRESS, or else on this machine: one task for each job,
    with so many accelerators (CPUs in a cluster without accelerators). A task whose machine is lost
    resumes elsewhere from its newest checkpoint. Every machine must have this package installed and
    see the RUN at the same path."""
    connect()
    import ray
    import ray.exceptions

    # A process for each task, so that its device memory is free when it ends.
    alone: Any = {"max_calls": 1, "max_retries": 0}
    task = ray.remote(**alone, **_resources(ray.nodes(), devices))(_train_there)

    def begin(job: _Job) -> Any:
        return task.remote(str(run.directory.absolute()), run.settings, job.names)

    pending = {begin(job): job for job in waiting}
    failures: dict[str, str] = {}
    try:
        while pending:
            (ready,), _ = ray.wait(list(pending))
            job = pending.pop(ready)
            try:
                found = ray.get(ready)
            except ray.exceptions.RayError as error:
                failed = isinstance(error, ray.exceptions.RayTaskError)
                stopped = not failed or isinstance(error.cause, Preempted)  # type: ignore[attr-defined]
                if stopped and job.again():
                    print(f"{job.label}: lost, and begun again", file=sys.stderr)
                    pending[begin(job)] = job
                    continue
                found = dict.fromkeys(job.names, f"Ray: {str(error).strip().splitlines()[-1]}")
            failures |= found
            for name in job.names:
                print(f"{name}: {'failed' if name in found else 'done'}", file=sys.stderr)
    finally:
        for unfinished in pending:
            ray.cancel(unfinished)
    return failures


def _train_there(directory: str, settings: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Trains experts on a machine of the cluster; returns why some failed, by name."""
    from xelm.process import prepare

    prepare()
    run = open_run(directory, settings=settings)
    failures = try_experts(run, names, wait_seconds=_LOCK_SECONDS)
    return {name: str(error) for name, error in failures.items()}


def _resources(nodes: Sequence[Mapping[str, Any]], devices: int) -> dict[str, Any]:
    """Resources that a task requests of Ray; UserError if no machine has enough."""
    for kind in ("GPU", "TPU", "CPU"):
        most = max((node["Resources"].get(kind, 0) for node in nodes if node["Alive"]), default=0)
        if not most:
            continue
        if devices > most:
            raise UserError(
                f"{devices} devices for each expert are more than any machine of the cluster has: "
                f"{most:g} {kind}"
            )
        if kind == "TPU":
            return {"resources": {"TPU": devices}}
        return {f"num_{kind.lower()}s": devices}
    raise UserError("the Ray cluster has no machine with resources")
