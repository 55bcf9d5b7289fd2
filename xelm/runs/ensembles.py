"""The published experts of a RUN with a router over them."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Literal

from clustering.errors import UserError
from experts.expert import Expert
from xelm.inference.ensemble import Ensemble
from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.sampling import sampling_of
from xelm.models.checkpoint import inference_dtype, read_config, read_for_inference
from xelm.runs.checking import check_models
from xelm.runs.routers import Routing, make_router, models_behind
from xelm.runs.run import Run


def open_ensemble(
    run: Run,
    routing: Routing,
    *,
    route_per: Literal["token", "prompt", "sequence"] = "token",
    dtype: str = "auto",
) -> Ensemble:
    """Every published expert and the models that the router weighs behind them, each loaded when it
    is first asked. dtype: of parameters and products; see `common_dtype`."""
    experts = published(run)
    check_top_m(routing.top_m, len(experts))
    others = models_behind(run, routing)
    check_models(run, experts, others)
    systems = {expert.name: expert.directory(run.directory) for expert in experts} | others
    model, dtype = read_config(run.seed), common_dtype(systems.values(), dtype)
    return Ensemble(
        names=list(systems),
        model=model,
        parameters=ParameterCache(
            [partial(read_for_inference, path, model, dtype) for path in systems.values()]
        ),
        dtype=dtype,
        router=make_router(run, experts, routing),
        tokenizer=run.tokenizer(),
        top_m=routing.top_m,
        # Whoever was given a weight by hand is asked.
        least_weight=0.0 if routing.name == "fixed" else routing.least_weight,
        route_per=route_per,
        context_length=run.context_length,
        sampling=sampling_of(run.seed)[0],
    )


def common_dtype(checkpoints: Iterable[Path], dtype: str) -> str:
    """The dtype in which checkpoints are run side by side: `inference_dtype` of all of them, or
    float32 where they differ."""
    found = {inference_dtype(checkpoint, dtype) for checkpoint in checkpoints}
    return found.pop() if len(found) == 1 else "float32"


def published(run: Run) -> tuple[Expert, ...]:
    """The experts of the ensemble, at least one."""
    experts = run.registry().published()
    if not experts:
        raise UserError(
            f"{run.directory} has no published expert yet; run: xelm train {run.directory} --all"
        )
    return experts


def check_top_m(top_m: int | None, experts: int) -> None:
    """Raises UserError unless so many of the experts can be asked."""
    if top_m is not None and not 1 <= top_m <= experts:
        raise UserError(f"top_m must be between 1 and {experts} experts; got {top_m}")
