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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clustering.engines import connect
from clustering.errors import UserError
from xelm.runs.budget import announce, check_disk
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
    *,
    dense: bool = False,
    jobs: int = 1,
    engine: Literal["local", "ray"] = "local",
    devices: int = 1,
) -> dict[str, str]:
    """Trains the dense baseline if `dense`, then experts; returns why experts failed, by name.

    jobs: number of processes on this machine that train at the same time; 1 trains in this process.
    engine: "ray" trains over a Ray cluster, with so many `devices` for each expert.
    """
    apart = engine == "ray" or jobs > 1
    if dense and apart:
        train_dense_apart(run)
    elif dense:
        train_dense(run)
    if not apart:
        return {name: str(error) for name, error in try_experts(run, names).items()}
    # Other processes log for themselves; this one must not open a device to estimate their time.
    plans = plans_of(run, names, estimate=False)
    announce(plans)
    check_disk(run.directory, plans, together=jobs)
    return (
        train_over_ray(run, names, devices)
        if engine == "ray"
        else train_in_processes(run, names, jobs)
    )


def train_dense_apart(run: Run) -> None:
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


def train_in_processes(run: Run, names: Sequence[str], jobs: int) -> dict[str, str]:
    """Trains so many jobs in parallel, each in a process with its share of this machine's GPUs (or
    cores, without GPUs). The output of a process is in RUN/train/NAME.log. A process that was
    killed or terminated (exit code 75) is started again."""
    waiting = _groups(run, names)
    places = list(_places(min(jobs, len(waiting)) or 1))
    running: dict[int, _Process] = {}
    failures: dict[str, str] = {}
    with _ending(lambda: [process.handle for process in running.values()]):
        while waiting or running:
            for place in set(range(len(places))) - set(running):
                if waiting:
                    running[place] = _Process.start(run, waiting.pop(0), places[place])
            time.sleep(0.2)
            for place, process in list(running.items()):
                code = process.handle.poll()
                if code is None:
                    continue
                del running[place]
                if code == 0:
                    print(f"{process.label}: done", file=sys.stderr)
                elif process.again(code):
                    print(f"{process.label}: ended ({code}), started again", file=sys.stderr)
                    running[place] = _Process.start(run, process.names, places[place], process)
                else:
                    failures |= process.failures(code)
                    print(f"{process.label}: failed", file=sys.stderr)
    return failures


def train_over_ray(run: Run, names: Sequence[str], devices: int) -> dict[str, str]:
    """Trains on the Ray cluster at RAY_ADDRESS, or else on this machine: one task for each job,
    with so many accelerators for each of its experts (CPUs in a cluster without accelerators). A
    task whose machine is lost resumes elsewhere from its newest checkpoint. Every machine must have
    this package installed and see the RUN at the same path."""
    connect()
    import ray
    import ray.exceptions

    directory = str(run.directory.absolute())
    groups = _groups(run, names)
    wanted = _resources(ray.nodes(), devices * max(map(len, groups), default=1))
    # A process for each task, so that its device memory is free when it ends.
    alone: Any = {"max_calls": 1, "max_retries": 0}
    task = ray.remote(**alone, **wanted)(_train_there)
    pending = {task.remote(directory, run.settings, group): group for group in groups}
    begun_at = {group[0]: _steps(run, group) for group in groups}
    fruitless = dict.fromkeys(begun_at, 0)
    failures: dict[str, str] = {}
    try:
        while pending:
            (ready,), _ = ray.wait(list(pending))
            group = pending.pop(ready)
            try:
                found = ray.get(ready)
            except ray.exceptions.RayError as error:
                lost = not isinstance(error, ray.exceptions.RayTaskError)
                steps, before = _steps(run, group), begun_at[group[0]]
                fruitless[group[0]] = 0 if steps > before else fruitless[group[0]] + 1
                if fruitless[group[0]] <= RETRIES and (
                    lost or isinstance(error.cause, Preempted)  # type: ignore[attr-defined]
                ):
                    begun_at[group[0]] = steps
                    print(f"{', '.join(group)}: lost, and begun again", file=sys.stderr)
                    pending[task.remote(directory, run.settings, group)] = group
                    continue
                found = dict.fromkeys(group, f"Ray: {str(error).strip().splitlines()[-1]}")
            failures |= found
            for name in group:
                print(f"{name}: {'failed' if name in found else 'done'}", file=sys.stderr)
    finally:
        for unfinished in pending:
            ray.cancel(unfinished)
    return failures


def _groups(run: Run, names: Sequence[str]) -> list[list[str]]:
    size = run.config.experts.runtime.mesh_expert
    left = {expert.name for expert in run.registry().training()}
    names = [name for name in names if name in left]
    return [list(names[first : first + size]) for first in range(0, len(names), size)]


# Processes on this machine


def _command(run: Run) -> list[str]:
    settings = [text for setting in run.settings for text in ("--set", setting)]
    return [sys.executable, "-m", "xelm", "train", str(run.directory), *settings]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Process:
    names: Sequence[str]
    handle: subprocess.Popen
    log: Path
    begun_at: int
    """Number of steps that were saved when it began."""
    fruitless: int
    """Number of times in a row that it ended with nothing new saved."""
    run: Run

    @classmethod
    def start(
        cls, run: Run, names: Sequence[str], place: "_Place", before: "_Process | None" = None
    ) -> "_Process":
        log = run.training(names[0]).with_suffix(".log")
        log.parent.mkdir(exist_ok=True)
        step = _steps(run, names)
        fruitless = 0 if before is None or step > before.begun_at else before.fruitless + 1
        with log.open("ab" if before else "wb") as file:
            handle = subprocess.Popen(
                [*_command(run), *names],
                env={**os.environ, **place.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        if place.cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(handle.pid, place.cores)
        if before is None:
            print(f"{', '.join(names)}: begun; its log is {log}", file=sys.stderr)
        return cls(names=names, handle=handle, log=log, begun_at=step, fruitless=fruitless, run=run)

    @property
    def label(self) -> str:
        return ", ".join(self.names)

    def again(self, code: int) -> bool:
        """Whether a process that ended with this code is to be started again."""
        if code != os.EX_TEMPFAIL and code >= 0:
            return False
        return _steps(self.run, self.names) > self.begun_at or self.fruitless < RETRIES

    def failures(self, code: int) -> dict[str, str]:
        """Reason of the failure, by name of each expert that was not published before."""
        left = {expert.name for expert in self.run.registry().training()}
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = lines[-1].removeprefix("xelm: ") if lines else f"it ended with code {code}"
        if code < 0:
            said = f"{self.label} was killed by signal {-code} repeatedly; see {self.log}"
        found = {}
        for name in self.names:
            if name in left:
                kept = self.run.failure(name)
                found[name] = kept.read_text(encoding="utf-8") if kept.exists() else said
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    environment: Mapping[str, str]
    cores: Sequence[int]


def _places(jobs: int) -> Iterator[_Place]:
    """Equal parts of the GPUs or cores of this machine."""
    gpus = _gpus()
    if gpus:
        if jobs > len(gpus):
            raise UserError(f"{jobs} jobs at a time want a GPU each; there are {len(gpus)}")
        each = len(gpus) // jobs
        for job in range(jobs):
            mine = ",".join(gpus[job * each : (job + 1) * each])
            yield _Place(environment={"CUDA_VISIBLE_DEVICES": mine}, cores=())
        return
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    each = max(1, len(cores) // jobs)
    for job in range(jobs):
        mine = [cores[(job * each + i) % len(cores)] for i in range(each)] if cores else []
        yield _Place(environment={}, cores=mine)


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


def _steps(run: Run, names: Sequence[str]) -> int:
    """Number of steps of these trainings that are saved."""
    found = [each for each in progress(run) if each.name in names]
    return sum(each.step if each.state == "done" else each.checkpoint_step or 0 for each in found)


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
