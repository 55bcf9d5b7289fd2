"""`xelm merge`: one model of several models of a RUN, by a published method, as one checkpoint.

A merged model that is named lies in RUN/merges/NAME and is a model for all languages, like the
dense baseline: `evaluate` measures it beside the others. It is no expert, since it was trained on
no text of its own by which a router could find it; experts, routers and what serves a language stay
as they are.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from clustering.errors import UserError
from experts import lock
from experts import merge as files
from experts.expert import Expert, is_reference, parse_reference
from experts.history import command_line
from experts.manifest import MERGES, record
from experts.merge_methods import METHODS, MergeOptions
from xelm.data.rows import sampling_shares
from xelm.models.checkpoint import check_checkpoint, write_whole
from xelm.models.stored import stored_as
from xelm.runs.check import check_models
from xelm.runs.combined import check_model_name
from xelm.runs.ensembles import published
from xelm.runs.run import Run
from xelm.version import __version__

EQUAL, SHARE, HELD_OUT = "equal", "share", "held-out"
WEIGHTS = (EQUAL, SHARE, HELD_OUT)
"""Weights that are computed from the RUN."""


class Merged(NamedTuple):
    """A merged model that was written."""

    path: Path
    """Directory of its checkpoint."""
    weights: dict[str, float]
    """Model that was merged -> its weight, as in merge.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    """A model that is merged."""

    source: files.Source
    expert: Expert | None = None
    inside: bool = True
    """Whether it lies in the RUN, with recorded hashes."""


def merge(
    run: Run,
    names: Sequence[str] = (),
    options: MergeOptions | None = None,
    *,
    weights: str | Sequence[float] = EQUAL,
    base: str | None = None,
    name: str | None = None,
    out: str | Path | None = None,
) -> Merged:
    """Merges models of a RUN into RUN/merges/`name`, or into the directory `out`.

    names: experts (NAME, or NAME@v1 for a version, which may be retired), "seed", "dense", merged
    models ("merges/NAME"), and directories of other checkpoints of the same shape and vocabulary;
    none: all published experts. weights: one for each, or one of `WEIGHTS`: "share" is the share of
    an expert's languages in a training on the languages of all; "held-out" the share of the seed's
    bits a byte that it saves on held-out text of its own languages, by its record. base: model from
    which differences are taken; None: the seed.

    UserError for what the method does not take, for models that are damaged or differ in shape,
    vocabulary or configuration, and where something is in the place already.
    """
    options = options or MergeOptions()
    if (name is None) == (out is None):
        raise UserError("give a name in the RUN, or a directory, but not both")
    method = METHODS[options.method]
    if base is not None and not method.has_base:
        takes = [other for other, one in METHODS.items() if one.has_base]
        raise UserError(f"base has no effect on {options.method}; it goes with {', '.join(takes)}")
    if names:
        models = [_find(run, each) for each in names]
    else:
        models = [_of_expert(run, expert) for expert in published(run)]
    origin = _find(run, base or "seed") if method.has_base else None
    _check(run, [*models, *([origin] if origin else [])])
    given = [each.source.name for each in models]
    if twice := sorted({each for each in given if given.count(each) > 1}):
        raise UserError(f"{', '.join(twice)} is named twice; give it a larger weight instead")
    numbers = _weights(run, models, weights)
    with ExitStack() as folders:
        sources = [_complete(each.source, folders) for each in models]
        start = _complete(origin.source, folders) if origin else None
        return _write(run, (sources, start), options, numbers, weights, name, out)


def _complete(source: files.Source, folders: ExitStack) -> files.Source:
    """A source as a complete checkpoint: one that is stored as a difference from a base is composed
    in a temporary folder."""
    if stored_as(source.directory) is None:
        return source
    whole = Path(folders.enter_context(TemporaryDirectory())) / "whole"
    write_whole(source.directory, whole)
    return files.Source(source.name, whole, source.directory)


def _write(
    run: Run,
    models: tuple[Sequence[files.Source], files.Source | None],
    options: MergeOptions,
    numbers: Sequence[float] | None,
    weights: str | Sequence[float],
    name: str | None,
    out: str | Path | None,
) -> Merged:
    sources, start = models
    facts = {
        "weights": weights if isinstance(weights, str) else "given",
        "xelm": __version__,
        "command": command_line(),
    }
    if out is not None:
        path = files.merge(sources, out, options, weights=numbers, base=start, facts=facts)
        return _merged(path)
    assert name is not None
    place = _place(name)
    path = run.directory / place
    with lock.locked(run.directory, f"merge-{name}"):
        if place in run.combined():
            raise UserError(f"{path} exists already; nothing is overwritten")
        if (path / files.RECORD).exists():  # of a merge that was interrupted
            shutil.rmtree(path)
        files.merge(sources, path, options, weights=numbers, base=start, facts=facts)
        record(run.directory, [place], again=True)
        lock.record(run.directory, "merge", (), {"model": place, "of": [s.name for s in sources]})
    return _merged(path)


def _place(name: str) -> str:
    """Directory of a merged model, relative to the RUN; UserError for an impossible name."""
    check_model_name(name, "merged model")
    return f"{MERGES}/{name}"


def _merged(path: Path) -> Merged:
    written = files.read_record(path)
    return Merged(path, {each["name"]: each["weight"] for each in written["sources"]})


def _find(run: Run, name: str) -> _Model:
    """The model of this name; UserError if there is none, or if it has no weights yet."""
    registry = run.registry()
    if name == "seed":
        return _Model(source=files.Source(name, run.seed))
    if name == "dense":
        if not run.dense.exists():
            raise UserError(
                f"{run.directory} has no dense baseline; run: xelm train {run.directory} --dense"
            )
        return _Model(source=files.Source(name, run.dense))
    if name in (combined := run.combined()):
        return _Model(source=files.Source(name, combined[name]))
    if is_reference(name):
        return _of_expert(run, registry.expert(*parse_reference(name)))
    if not any(expert.name == name for expert in registry.experts):
        if Path(name).is_dir():
            return _Model(source=files.Source(name, Path(name)), inside=False)
        if "/" in name:
            raise UserError(f"there is no directory {name}, and no merged model of this name")
    return _of_expert(run, registry.in_use(name))


def _of_expert(run: Run, expert: Expert) -> _Model:
    directory = expert.directory(run.directory)
    if not expert.sha256 or not directory.exists():
        state = "in training" if expert.status == "training" else "not on disk any more"
        raise UserError(f"{expert.reference} is {state}: it has no published weights to merge")
    return _Model(source=files.Source(expert.reference, directory), expert=expert)


def _check(run: Run, models: Sequence[_Model]) -> None:
    """Raises UserError unless models of the RUN are as they were written, and directories from
    elsewhere are checkpoints."""
    experts = {each.expert.reference: each.expert for each in models if each.expert}
    inside = [each.source for each in models if each.inside and each.expert is None]
    check_models(run, experts.values(), {each.name: each.directory for each in inside})
    for each in models:
        if not each.inside:
            check_checkpoint(each.source.directory)


def _weights(
    run: Run, models: Sequence[_Model], weights: str | Sequence[float]
) -> list[float] | None:
    """Numbers for weights of any kind, with mean 1 if they are computed; None for equal ones."""
    if not isinstance(weights, str):
        return list(weights)
    if weights == EQUAL:
        return None
    if weights not in WEIGHTS:
        raise UserError(f"weights must be numbers or one of {', '.join(WEIGHTS)}; got {weights!r}")
    experts = [each.expert for each in models if each.expert]
    if len(experts) < len(models):
        other = next(each.source.name for each in models if each.expert is None)
        raise UserError(
            f"{other} is no expert, so that it has no weight by {weights}; give numbers"
        )
    found = _shares(run, experts) if weights == SHARE else [_saving(each) for each in experts]
    if not sum(found) > 0:
        raise UserError("no expert saves anything on held-out text; give numbers as weights")
    return [len(found) * value / math.fsum(found) for value in found]


def _shares(run: Run, experts: Sequence[Expert]) -> list[float]:
    """Share of each expert's languages in a training on the languages of all of them, sampled as
    the RUN's. A language that several have is divided by their documents, or equally."""
    parts: list[Mapping[str, float]] = [
        each.documents or dict.fromkeys(each.languages, 1) for each in experts
    ]
    tags = sorted({tag for part in parts for tag in part})
    texts = run.texts(tags)
    if missing := [tag for tag in tags if tag not in texts]:
        raise UserError(
            f"{run.directory} has no text of {', '.join(missing)} any more; give numbers as weights"
        )
    sizes = {tag: sum(len(text.ids) for text in found) for tag, found in texts.items()}
    shares = sampling_shares(sizes, run.config.experts.data.sampling_exponent)
    totals = {tag: sum(part.get(tag, 0) for part in parts) for tag in tags}
    return [
        math.fsum(shares[tag] * count / totals[tag] for tag, count in part.items())
        for part in parts
    ]


def _saving(expert: Expert) -> float:
    """Mean share of the seed's bits a byte that an expert saves on held-out text of its own
    languages; 0 for one that is worse than the seed."""
    own = (expert.evaluation or {}).get("own", {})
    if not own:
        raise UserError(
            f"{expert.reference} has no figures on held-out text; give numbers as weights"
        )
    return max(0.0, math.fsum(1 - f["expert"] / f["seed"] for f in own.values()) / len(own))
