"""Costs of trainings, before they start: tokens, passes over each language, time and disk."""

import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clustering.errors import UserError
from xelm.data.rows import LanguageShare
from xelm.models.config import ModelConfig
from xelm.progress import duration
from xelm.runs.run import Run
from xelm.training.metrics import read_metrics, seconds_of
from xelm.training_config import TrainConfig

MOST_PASSES = 4.0
"""Passes over a language's text above which a warning is given: up to four are about as good as new
text, and more teach less and less (Muennighoff et al. 2023, arXiv 2305.16264)."""
UTILISATION = 0.3
"""Share of a device's peak that an estimate assumes where nothing was measured."""
_UNKNOWN = "unknown until its first steps (xelm status)"
_LISTED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Cost of one training that is to begin or to be resumed."""

    name: str
    part: str
    """Part of the configuration with its settings: seed, experts, dense or grow."""
    tokens: int
    """Number of positions in the rows of all steps."""
    steps: int
    passes: Mapping[str, float]
    """Language -> number of passes over its text."""
    seconds: float | None
    """Seconds left to train; None where no rate is known."""
    estimated: bool = False
    """Whether the seconds do not come from steps of a training in the RUN."""
    basis: str
    """Source of the rate that `seconds` is computed from."""
    checkpoint_bytes: int
    """Bytes of the checkpoints that are kept and of the one being written."""
    model_bytes: int
    """Largest number of bytes of the published weights."""
    teacher_bytes: int = 0
    """Bytes of a teacher's predictions that are not written yet; they are deleted in the end."""

    @property
    def disk_bytes(self) -> int:
        """Largest number of bytes on disk at any time."""
        return self.checkpoint_bytes + self.model_bytes + self.teacher_bytes


def plan(
    run: Run,
    name: str,
    part: str,
    sources: Sequence[LanguageShare],
    config: TrainConfig,
    model: ModelConfig,
    *,
    estimate: bool = True,
) -> Plan:
    """The cost of training `name` on these sources with these settings, which are the
    configuration's `part`. estimate: whether to estimate the time on this machine's devices if no
    training in the RUN tells it."""
    lines = read_metrics(run.training(name) / "metrics.jsonl")
    left = (config.steps - (lines[-1]["step"] if lines else 0)) * config.tokens_per_step
    found = _measured(run, name, config)
    estimated = found is None and estimate
    rate, basis = found or (_estimated(config, model) if estimated else (None, _UNKNOWN))
    return Plan(
        name=name,
        part=part,
        tokens=config.steps * config.tokens_per_step,
        steps=config.steps,
        passes=passes(sources, config),
        seconds=None if rate is None else left / rate,
        estimated=estimated,
        basis=basis,
        checkpoint_bytes=_checkpoint_bytes(config, model),
        model_bytes=4 * _written_count(config, model),
    )


def passes(sources: Sequence[LanguageShare], config: TrainConfig) -> dict[str, float]:
    """Number of passes over the text of each language in a training."""
    total = sum(source.share for source in sources)
    read, there = defaultdict[str, float](float), defaultdict[str, int](int)
    for source in sources:
        tag = source.ids.language
        read[tag] += config.steps * config.batch_size * source.share / total
        # As many as `LanguageRows` has, of which the last is filled up.
        there[tag] += max(1, -(-(source.tokens - 1) // config.sequence_length))
    return {tag: read[tag] / there[tag] for tag in read}


def announce(plans: Sequence[Plan]) -> None:
    """Prints the costs of trainings on stderr, with warnings of too many passes over a text."""
    for line in [table(plans), *warnings(plans)] if plans else ():
        print(line, file=sys.stderr)


def check_disk(directory: Path, plans: Sequence[Plan], *, together: int = 1) -> None:
    """Raises UserError if the files of these trainings do not fit on the disk of `directory`, a RUN
    that may not exist yet. together: number of trainings that run at the same time."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    needed, free = needed_bytes(directory, plans, together), shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"{directory} has {size(free)} of disk left, and {_listed([p.name for p in plans])} "
            f"would write up to {size(needed)} (checkpoints and weights); make room, or lower "
            "runtime.keep_checkpoints"
        )


def needed_bytes(directory: Path, plans: Sequence[Plan], together: int = 1) -> int:
    """Bytes that trainings write beyond what is there, if so many run at the same time: checkpoints
    are deleted when a training is done, weights stay."""
    left = []
    for each in plans:
        folder = directory / "train" / each.name.replace("/", "+")
        written = [file for file in (folder / "checkpoints").rglob("*") if file.is_file()]
        bytes_left = max(0, each.checkpoint_bytes - sum(file.stat().st_size for file in written))
        left.append(bytes_left + each.teacher_bytes)
    return sum(p.model_bytes for p in plans) + sum(sorted(left, reverse=True)[:together])


def warnings(plans: Sequence[Plan]) -> list[str]:
    """One line for each training that passes over a language more than `MOST_PASSES` times."""
    lines = []
    for each in plans:
        often = {f"{t} {_times(n)}": n for t, n in each.passes.items() if n > MOST_PASSES}
        if not often:
            continue
        which = _listed(sorted(often, key=lambda text: -often[text]))
        part = "experts" if each.part == "dense" else each.part
        fewer = f"make the RUN with fewer tokens (xelm init --set {part}.tokens=N)"
        if part == "grow":
            other = f"--set grow.max_passes={MOST_PASSES:g}"
            fewer = f"begin on fewer tokens (xelm grow --tokens N, or {other})"
        lines.append(
            f"{each.name}: passes over the same text: {which}. More than "
            f"{MOST_PASSES:g} teach little and may do harm; give more text, or {fewer}"
        )
    return lines


def table(plans: Sequence[Plan]) -> str:
    """A table with one line for each training."""
    lines = [f"{'training':20}{'tokens':>16}{'steps':>10}{'passes':>16}{'disk':>10}  time"]
    for each in plans:
        times = sorted(each.passes.values())
        shown = _times(times[0]) if times else "-"
        if times and _times(times[-1]) != shown:
            shown += f" to {_times(times[-1])}"
        about = "about " if each.estimated else ""
        time = "" if each.seconds is None else f"{about}{duration(each.seconds)}, "
        lines.append(
            f"{each.name:20}{each.tokens:>16,}{each.steps:>10,}{shown:>16}"
            f"{size(each.disk_bytes):>10}  {time}{each.basis}"
        )
    return "\n".join(lines)


def size(count: float) -> str:
    """A number of bytes in words: 950 B, 1.2 MB, 3 GB."""
    for unit, letters in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {letters}"
    return f"{count:.0f} B"


def _times(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _checkpoint_bytes(config: TrainConfig, model: ModelConfig) -> int:
    """Bytes of all checkpoints when they are most: those kept, and the one being written."""
    optimizer, runtime = config.optimizer, config.runtime
    average = 2 if runtime.moments_dtype == "bfloat16" else 4
    averages = 2 * average if optimizer.name == "adamw" else average * (optimizer.beta1 > 0)
    # The one with the best measurement is kept too, and each that is better than those before it is
    # saved.
    saved = -(-config.steps // runtime.checkpoint_every)
    saved += config.steps // config.steps_between_measurements
    kept = min(saved, runtime.keep_checkpoints + 2)
    if runtime.keep_every is not None:
        kept = min(saved, kept + config.steps // runtime.keep_every)
    return kept * (4 + averages) * _trained_count(config, model)


def _trained_count(config: TrainConfig, model: ModelConfig) -> int:
    if config.lora.rank is None and config.frozen_layers is None:
        return model.parameter_count
    from xelm.training.trainable import trained_count

    return trained_count(config, model)


def _written_count(config: TrainConfig, model: ModelConfig) -> int:
    """Number of values in a published expert, of which frozen layers are a part."""
    return model.parameter_count if config.lora.rank is None else _trained_count(config, model)


def _measured(run: Run, name: str, config: TrainConfig) -> tuple[float, str] | None:
    """Positions per second of the training so far or, if it has not begun, of a training in the RUN
    with similar rows and batches; and which it is."""
    trainings, rates = [(name, run.training(name), config)], []
    if (run.directory / "registry.json").exists():
        for expert in reversed(run.registry().published()):
            its = run.config.grow if expert.cluster is None else run.config.experts
            trainings.append((expert.name, expert.directory(run.directory), its))
    trainings += [("dense", run.dense, run.config.dense), ("seed", run.seed, run.config.seed)]
    for other, folder, its in trainings:
        lines = read_metrics(folder / "metrics.jsonl")
        seconds = seconds_of(lines)
        if seconds is None:
            continue
        rate = lines[-1]["step"] * its.tokens_per_step / seconds
        if other == name or _shape(its) == _shape(config):
            whose = "it was until now" if other == name else f"{other} was here"
            return rate, f"as fast as {whose}"
        same_length = its.sequence_length == config.sequence_length
        if same_length and its.runtime.dtype == config.runtime.dtype:
            rates.append((rate, f"as fast as {other} was here, in batches of {its.batch_size}"))
    return rates[0] if rates else None


def _shape(config: TrainConfig) -> tuple:
    """Settings that the rate of a training depends on."""
    where = config.runtime
    rows = (config.sequence_length, config.batch_size, where.accumulation_steps)
    mesh = (where.mesh_expert, where.mesh_data, where.mesh_fsdp, where.mesh_tensor)
    return *rows, where.dtype, where.rematerialise, *mesh


def _estimated(config: TrainConfig, model: ModelConfig) -> tuple[float, str]:
    """Positions per second of this machine's devices, and what the estimate is made from: their
    peak if it is known, or else the speed of one layer."""
    import jax

    from xelm.training.flops import of_a_token, peak
    from xelm.training.rate import estimated_rate

    # Several devices of the platform `cpu` share the same cores.
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    most = peak(config.runtime.dtype, devices)
    if most is None:
        rate = estimated_rate(model, config)
        made = "estimated from one layer's forward and backward pass, measured here"
        return devices * rate, made
    rate, kind = UTILISATION * most / of_a_token(model, config.sequence_length), jax.devices()[0]
    return rate, f"estimated from {UTILISATION:.0%} of the peak of {devices} x {kind.device_kind}"
