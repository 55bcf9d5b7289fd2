"""`xelm train --rounds`: experts of coarse clusters first, those of finer clusters from them."""

from collections.abc import Sequence
from dataclasses import replace

from clustering.errors import UserError
from clustering.nested import nested
from experts.expert import Expert
from experts.lock import update
from experts.registry import Registry
from experts.rounds import begin_rounds, next_round, rounds_of
from xelm.runs import train
from xelm.runs.budget import Plan
from xelm.runs.jobs import expert_job
from xelm.runs.launch import launch
from xelm.runs.options import LaunchOptions
from xelm.runs.run import Run
from xelm.runs.shares import dense_text, expert_text, with_passes


def train_rounds(
    run: Run, counts: Sequence[int], options: LaunchOptions | None = None, *, dense: bool = False
) -> dict[str, str]:
    """Trains the experts of a RUN in rounds, or goes on with that; returns why experts failed, by
    name. A round begins when all experts of the one before are trained.

    counts: number of clusters of each round, coarse to fine; the last is that of the RUN. Every
    round has an equal part of `experts.tokens`, which its experts share by their languages as in
    training in one round, so that all rounds together see each language as often as one round of
    the same tokens does. dense: train the dense baseline first. UserError where `plan_rounds`
    raises it."""
    update(run.directory, lambda registry: _planned(run, counts), "rounds")
    while True:
        registry = _begin_round(run)
        ready = [e.name for e in registry.training() if e.cluster is not None and not e.awaits]
        if not ready and not dense:
            return {}
        if failures := launch(run, ready, options, dense=dense):
            return failures
        dense = False


def _begin_round(run: Run) -> Registry:
    """The registry in which all experts whose parents are trained start from these."""
    before, after = run.registry(), next_round(run.registry())
    changed = [new for new, old in zip(after.experts, before.experts) if new != old]
    facts = {"parents": {expert.reference: expert.parent for expert in changed}}
    return update(run.directory, next_round, "next round", facts)


def plan_rounds(run: Run, counts: Sequence[int], *, dense: bool = False) -> list[Plan]:
    """What `train_rounds` would cost with these arguments; nothing in the RUN changes. UserError
    for clusters that cannot form these rounds, for a RUN whose training has begun otherwise, and
    for other rounds than it began with."""
    left = [expert for expert in _planned(run, counts).training() if expert.cluster is not None]
    plans = train.plans_of(run, dense=dense)
    return plans + train.plans_of_jobs(run, [expert_job(run, expert) for expert in left])


def _planned(run: Run, counts: Sequence[int]) -> Registry:
    """The registry with the experts of all rounds."""
    clustering, registry = run.clusters(), run.registry()
    if clustering.of_documents:
        raise UserError("rounds need clusters of languages; these are of documents")
    levels = nested(clustering, counts)
    if begun := rounds_of(registry):
        if begun != tuple(counts):
            began = ",".join(map(str, begun))
            raise UserError(
                f"{run.directory} is trained in other rounds already; go on with --rounds {began}"
            )
        return registry
    started = [e.name for e in registry.training() if run.training(e.name).exists()]
    if started:
        raise UserError(
            f"rounds come before all other training, and {', '.join(started)} has begun; give it "
            f"up with: xelm discard {run.directory} {started[0]}"
        )
    planned = begin_rounds(registry, levels)
    tokens = with_passes(run.config.experts, dense_text(run).tokens).tokens / len(counts)
    experts = [_with_budget(run, expert, tokens) for expert in planned.experts]
    return replace(planned, experts=tuple(experts))


def _with_budget(run: Run, expert: Expert, tokens: float) -> Expert:
    """The expert with its part of the tokens of a round in its settings."""
    own = max(1, round(tokens * expert_text(run, expert).share))
    settings: dict[str, int | float | str | None] = {"experts.tokens": own}
    if run.config.experts.passes is not None:
        settings["experts.passes"] = None
    return replace(expert, settings=settings)
