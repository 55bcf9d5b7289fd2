"""Trainings of a RUN: what each starts from, its text, its settings and what it writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clustering.errors import UserError
from experts.expert import Expert
from experts.grow import begun_with
from experts.rounds import rounds_of
from xelm.data.held_out import TrainingText
from xelm.data.rows import LanguageShare
from xelm.data.store import Store
from xelm.models.checkpoint import read_config
from xelm.models.config import ModelConfig
from xelm.runs.budget import passes
from xelm.runs.run import Run
from xelm.runs.shares import (
    as_recorded,
    dense_text,
    divided,
    donor_text,
    expert_text,
    parent_directory,
    replay_text,
    with_passes,
)
from xelm.runs.vocabulary import read_by, start_of
from xelm.settings import own_settings
from xelm.training_config import TrainConfig

_VERSION_SEEDS = 1000
"""Distance of the random seeds of two versions; those of rounds are 1 apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A training of one checkpoint from another."""

    name: str
    """Name of the expert, or dense."""
    part: str
    """Part of the configuration with its settings: experts, dense or grow."""
    parent: Path
    """Checkpoint to start from."""
    target: Path
    """Checkpoint to write."""
    text: TrainingText
    """Documents of all rows, replayed ones too."""
    own: TrainingText
    """Those of `text` that the model is for."""
    replayed: tuple[str, ...] = ()
    """Languages of `text` that are replayed against forgetting."""
    pieces: int = 0
    """Number of pieces that its model has more than the seed."""
    config: TrainConfig


def dense_job(run: Run) -> Job:
    """The training of the dense baseline."""
    text = dense_text(run)
    return Job(
        name="dense",
        part="dense",
        parent=run.seed,
        target=run.dense,
        text=text,
        own=text,
        config=with_passes(run.config.dense, text.tokens),
    )


def expert_job(run: Run, expert: Expert, new: Mapping[str, Store] | None = None) -> Job:
    """The training of an expert, with the settings of its record and of the RUN. new: stores by
    name that are not in the RUN yet."""
    run = as_recorded(run, expert)
    job = _branched if part_of(expert) == "experts" else _grown
    own, parent = expert_text(run, expert, new), parent_directory(run, expert)
    text, replayed, config = job(run, expert, read_by(run, expert, own, new))
    # No version reads its rows in the order of the one before.
    random_seed = config.random_seed + _VERSION_SEEDS * (expert.version - 1)
    start = start_of(run, expert, parent, new)
    _check_trainable(run, expert, config, extended=start != parent)
    return Job(
        name=expert.name,
        part=part_of(expert),
        parent=start,
        target=expert.directory(run.directory),
        text=text,
        own=own,
        replayed=tuple(dict.fromkeys(source.ids.language for source in replayed.sources)),
        pieces=(expert.vocabulary or {}).get("pieces", 0),
        config=replace(config, random_seed=random_seed),
    )


def _check_trainable(run: Run, expert: Expert, config: TrainConfig, *, extended: bool) -> None:
    """Raises UserError for adapters and frozen layers that the model cannot have. extended: whether
    the training begins with new pieces."""
    if extended and config.lora.rank is not None:
        raise UserError(
            f"{expert.reference} begins with new pieces, whose embeddings adapters would freeze; "
            "train it without lora.rank"
        )
    check_part(part_of(expert), config, read_config(run.seed))


def check_part(part: str, config: TrainConfig, model: ModelConfig) -> None:
    """Raises UserError for adapters and frozen layers of a part of the configuration, such as
    "grow", that a model of this shape cannot have."""
    if config.lora.rank is None and config.frozen_layers is None:
        return
    from xelm.training.trainable import check_trainable

    try:
        check_trainable(config, model)
    except UserError as error:
        raise UserError(f"{part}.{error}") from None


def part_of(expert: Expert) -> str:
    """Name of the part of the configuration with the settings of an expert's training; a version
    that languages join is trained as one that is grown."""
    return "grow" if expert.cluster is None or expert.joined else "experts"


def command_of(run: Run, expert: Expert) -> str:
    """The command that goes on with the training of an expert."""
    if expert.joined:
        joined = ",".join(expert.joined)
        return f"xelm grow {run.directory} --language {joined} --into {expert.name}"
    if expert.intermediate or expert.awaits:
        counts = ",".join(map(str, rounds_of(run.registry())))
        return f"xelm train {run.directory} --rounds {counts}"
    if expert.cluster is None and expert.donor is None:
        group = begun_with(run.registry(), expert)
        tags = ",".join(tag for one in group for tag in one.languages)
        return f"xelm grow {run.directory} --language {tags}"
    again = " --again" if expert.version > 1 else ""
    return f"xelm train {run.directory} {expert.name}{again}"


def made_elsewhere(run: Run, expert: Expert) -> UserError:
    """The error for a version in training that is not trained here, such as an adopted one."""
    by = (expert.made or {}).get("by")
    return UserError(
        f"{expert.reference} is not trained here: it was begun with xelm {by}. Go on with that "
        f"command, publish it with xelm publish {run.directory} {expert.name}, or give it up with "
        f"xelm discard"
    )


def is_kept_back(run: Run, expert: Expert) -> bool:
    """Whether an expert is trained, and not published since the gate refused it."""
    trained = expert.status == "training" and expert.directory(run.directory).exists()
    return trained and run.failure(expert.name).exists()


def already_begun(run: Run, expert: Expert, how: str) -> UserError:
    """The error for a version whose training began otherwise than a command says. how: in what it
    differs, and how to go on, as in ", on another text; go on without --corpus"; one that was kept
    back is not trained on."""
    publish = f"; publish it with: xelm publish {run.directory} {expert.name}"
    kept_back = f"is trained, and the gate keeps it back{publish}"
    state = kept_back if is_kept_back(run, expert) else f"is in training already{how}"
    return UserError(
        f"{expert.reference} {state}, or give it up with: xelm discard {run.directory} "
        f"{expert.name}"
    )


def other_settings(run: Run, expert: Expert) -> str | None:
    """What the settings of a RUN say of the training of an expert that has begun with others, as in
    "with grow.tokens=7; got 8"; None if they agree."""
    part, began = part_of(expert), expert.settings or {}
    of_run = own_settings(replace(run, settings=()).config, run.settings, part)
    for name, value in own_settings(run.config, run.settings, part).items():
        before = began.get(name, of_run[name])
        if value != before:
            return f"with {name}={before}; got {value}"
    return None


def _branched(
    run: Run, expert: Expert, own: TrainingText
) -> tuple[TrainingText, TrainingText, TrainConfig]:
    """All text, its replayed part, and settings of an expert of a cluster: the first version has
    its part of the tokens of all experts together; further ones have a budget of their own in their
    record."""
    config = run.config.experts
    # No round reads its rows in the order of the one before.
    config = replace(config, random_seed=config.random_seed + expert.round - 1)
    replayed = divided(run, replay_text(run, expert, config.data, own.share))
    text = _mixed(own, replayed)
    if {"experts.tokens", "experts.passes"} & set(expert.settings or ()):
        return text, replayed, with_passes(config, _tokens_of_passes(own, text))
    config = with_passes(config, dense_text(run).tokens)
    return text, replayed, replace(config, tokens=max(1, round(config.tokens * text.share)))


def _grown(
    run: Run, expert: Expert, own: TrainingText
) -> tuple[TrainingText, TrainingText, TrainConfig]:
    """All text, its replayed part, and settings of a grown expert, which reads its donor's
    languages too."""
    config = run.config.grow
    if not own.sources:
        raise UserError(
            f"{expert.reference} has no text in {', '.join(expert.languages)} to train on; give "
            "some with --corpus"
        )
    donors = divided(run, donor_text(run, expert))
    replayed = divided(run, replay_text(run, expert, config.data, own.share))
    text = _mixed(own, donors, replayed)
    config = with_passes(config, _tokens_of_passes(own, text))
    config = _within_passes(" ".join(expert.languages), text.sources, config)
    # Rounds count from 2; no child sees its donor's rows in the order its parent saw them.
    random_seed = config.random_seed + expert.round - 2
    return text, replayed, replace(config, random_seed=random_seed)


def _mixed(own: TrainingText, *others: TrainingText) -> TrainingText:
    """The own text with others, which have their shares of the rows; the sum of the shares stays
    that of the own text."""
    share = 1 - sum(other.share for other in others) / own.share
    return TrainingText(
        sources=[
            *_parts(own.sources, share),
            *(source for other in others for source in other.sources),
        ],
        held_out=[
            *_parts(own.held_out, share),
            *(source for other in others for source in other.held_out),
        ],
    )


def _tokens_of_passes(own: TrainingText, text: TrainingText) -> float:
    """Number of tokens of a training in which its own text is read once."""
    rows = sum(each.share for each in text.sources[: len(own.sources)])
    return own.tokens * text.share / rows


def _parts(sources: Sequence[LanguageShare], share: float) -> list[LanguageShare]:
    return [replace(source, share=source.share * share) for source in sources]


def _within_passes(tag: str, sources: Sequence[LanguageShare], config: TrainConfig) -> TrainConfig:
    """The configuration with the largest number of steps that passes over no language more often
    than `max_passes`, if there is such a limit."""
    if config.max_passes is None:
        return config
    most = max(passes(sources, config).values()) / config.steps
    steps = int(config.max_passes / most + 1e-9)
    if steps >= config.steps:
        return config
    if not steps:
        raise UserError(
            f"{tag}: one step passes over its text or its parent's {most:.3g} times, and "
            f"grow.max_passes is {config.max_passes:g}; give more text, or raise grow.max_passes"
        )
    return replace(config, tokens=steps * config.tokens_per_step)
