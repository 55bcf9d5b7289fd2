"""The published experts of a RUN with a router over them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import numpy as np

from clustering.errors import UserError
from clustering.files import read_arrays
from experts.expert import Expert
from experts.registry import Registry
from xelm.inference.ensemble import Ensemble
from xelm.inference.holding import Holding
from xelm.inference.routing import ROUTINGS, ByLanguage, Posterior, Router, Tfidf, Uniform
from xelm.inference.sampling import sampling_of
from xelm.models.checkpoint import read_config, read_for_inference
from xelm.runs.run import Run
from xelm.runs.training import CENTRE


def open_ensemble(
    run: Run,
    *,
    routing: str = "tfidf",
    top_m: int | None = None,
    temperature: float | None = None,
    dtype: str | None = None,
) -> Ensemble:
    """Every published expert, each loaded when it is first asked. dtype: of parameters and
    products; None: bfloat16 on accelerators, float32 on CPUs."""
    experts = published(run)
    model = read_config(run.seed)
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    check_top_m(top_m, len(experts))
    return Ensemble(
        names=[expert.name for expert in experts],
        model=model,
        parameters=Holding(
            [partial(read_for_inference, e.directory(run.directory), model, dtype) for e in experts]
        ),
        dtype=dtype,
        router=make_router(run, experts, routing, temperature),
        tokenizer=run.tokenizer(),
        top_m=top_m,
        sequence_length=run.config.experts.sequence_length,
        sampling=sampling_of(run.seed)[0],
    )


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


def make_router(
    run: Run, experts: Sequence[Expert], routing: str, temperature: float | None = None
) -> Router:
    """The router of that name over these experts. temperature: of TF-IDF routing."""
    count = len(experts)
    if temperature is not None and routing in ROUTINGS and routing != "tfidf":
        raise UserError(f"a router's temperature goes with routing tfidf; got {routing}")
    if routing == "uniform":
        return Uniform(experts=count)
    if routing == "posterior":
        return Posterior(prior=np.full(count, -np.log(count)))
    if routing == "language":
        return ByLanguage(experts=count, serving=serving(run.registry(), experts))
    if routing == "tfidf":
        centres = [read_arrays(e.directory(run.directory) / CENTRE)["centre"] for e in experts]
        router = Tfidf(vectoriser=run.vectoriser(), centres=np.stack(centres))
        return router if temperature is None else replace(router, temperature=temperature)
    raise UserError(f"routing must be one of {', '.join(ROUTINGS)}; got {routing!r}")


def serving(registry: Registry, experts: Sequence[Expert]) -> dict[str, int]:
    """Language -> index of the expert that serves it."""
    names = [expert.name for expert in experts]
    tags = dict.fromkeys(tag for expert in experts for tag in expert.languages)
    return {tag: names.index(registry.for_language(tag).name) for tag in tags}
