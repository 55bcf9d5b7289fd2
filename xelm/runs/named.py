"""A model of a RUN by its name: the seed, the dense baseline, an expert or a version of one, or one
that is made of several."""

from pathlib import Path
from typing import NamedTuple

from clustering.errors import UserError
from experts.expert import SEED, Expert, is_reference, parse_reference
from xelm.runs.check import check_models
from xelm.runs.run import Run


class NamedModel(NamedTuple):
    """A model of a RUN."""

    directory: Path
    """Its checkpoint."""
    expert: Expert | None
    """Its record, if it is an expert."""


def find_model(run: Run, name: str) -> NamedModel:
    """The model of this name, whose files are as they were published. name: an expert, NAME@vN for
    a certain version of it, "seed", "dense", or one of `Run.combined`. UserError if there is
    none."""
    general = {SEED: run.seed, "dense": run.dense, **run.combined()}
    if name in general:
        if not general[name].is_dir():
            raise UserError(
                f"{run.directory} has no dense baseline; run: xelm train {run.directory} --dense"
            )
        check_models(run, (), {name: general[name]})
        return NamedModel(general[name], None)
    registry = run.registry()
    if "/" in name:  # as in merges/NAME
        known = ", ".join([*general, *dict.fromkeys(e.name for e in registry.published())])
        raise UserError(f"{run.directory} has no model {name!r}; known: {known}")
    if is_reference(name):
        expert = registry.expert(*parse_reference(name))
    else:
        expert = registry.in_use(name)
    if not expert.sha256 or not expert.directory(run.directory).exists():
        state = "in training" if expert.status == "training" else "not on disk any more"
        raise UserError(f"{expert.reference} is {state}: it has no published weights")
    check_models(run, [expert])
    return NamedModel(expert.directory(run.directory), expert)
