"""Makes routers over the published experts of a RUN from what is fitted on its text."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from clustering.errors import UserError
from clustering.files import read_arrays
from experts.expert import Expert
from experts.registry import Registry
from xelm.inference import routers
from xelm.inference.route import Router
from xelm.inference.routing import Routing
from xelm.runs.fit import identifier, learned, novelty_of, pieces
from xelm.runs.publish import CENTRE
from xelm.runs.run import Run

OR_MIXTURE = ("learned", "detected")
"""Routings that know experts by their texts, and mix all models for a text that is unlike these."""


def make_router(run: Run, experts: Sequence[Expert], routing: Routing) -> Router:
    """The router over these experts. With every routing, a text whose language is given goes to the
    expert that serves it; only fixed weights stay as given."""
    served = serving(experts)
    if routing.name == "language":
        retired = _retired(run.registry(), served)
        return routers.ByLanguage(experts=len(experts), serving=served, retired=retired)
    router = _router(run, experts, routing, served)
    if routing.abstain is not None:
        count = len(experts)
        instead = routers.Posterior(prior=routers.uniform(count).weights)
        if routing.abstain_to != "posterior":
            instead = routers.only(count, count + 1, routing.abstain_to)
        router = routers.Abstaining(router=router, threshold=routing.abstain, instead=instead)
    elif routing.name in OR_MIXTURE and (found := novelty_of(run, served)) is not None:
        mixed = routers.mixture_of(len(experts) + len(models_behind(run, routing)))
        router = routers.OrMixture(router=router, novelty=found, pieces=pieces(run), mixture=mixed)
    if routing.name == "fixed":
        return router
    return routers.ByLanguage(experts=router.experts, serving=served, otherwise=router)


def models_behind(run: Run, routing: Routing) -> dict[str, Path]:
    """Name and checkpoint of each model beside the experts that a router weighs or abstains to;
    UserError if it does not exist."""
    general = general_models(run)
    if routing.abstain is None:
        return general if routing.name in OR_MIXTURE else {}
    if routing.abstain_to == "posterior":
        return {}
    if routing.abstain_to not in general:
        raise UserError(
            f"{run.directory} has no dense baseline to abstain to; train one (xelm train --dense) "
            "or abstain to the seed"
        )
    return {routing.abstain_to: general[routing.abstain_to]}


def general_models(run: Run) -> dict[str, Path]:
    """Name and checkpoint of each model for all languages: the seed, and the dense baseline if it
    was trained."""
    return {"seed": run.seed} | ({"dense": run.dense} if run.dense.exists() else {})


def _router(
    run: Run, experts: Sequence[Expert], routing: Routing, served: Mapping[str, int]
) -> Router:
    count = len(experts)
    if routing.name == "uniform":
        return routers.uniform(count)
    if routing.name == "fixed":
        return routers.Fixed(
            weights=_fixed(run, [expert.name for expert in experts], routing.weights)
        )
    if routing.name == "posterior":
        memory = 1.0 if routing.memory is None else routing.memory
        return routers.Posterior(prior=routers.uniform(count).weights, memory=memory)
    if routing.name == "detected":
        if not served:
            raise UserError(
                f"no expert of {run.directory} serves a language of its own: detected routing has "
                "nothing to go by"
            )
        found, names = identifier(run), pieces(run)
        return routers.Detected(experts=count, identifier=found, pieces=names, serving=served)
    places = [place for place, expert in enumerate(experts) if expert.texts]
    if not places:
        raise UserError(
            f"no expert of {run.directory} has text by which {routing.name} routing could know it; "
            "use routing by language, posterior or uniform"
        )
    found = _by_text(run, [experts[place] for place in places], routing)
    if len(places) == count:
        return found
    return routers.OfSome(router=found, places=places, experts=count)


def _by_text(run: Run, experts: Sequence[Expert], routing: Routing) -> Router:
    """The learned router, or that by TF-IDF, over experts that have text."""
    if routing.name == "learned":
        return learned(run, experts)
    temperature, distance_power = routing.tfidf
    centres = [read_arrays(e.directory(run.directory) / CENTRE)["centre"] for e in experts]
    return routers.Tfidf(
        vectoriser=run.vectoriser(),
        centres=np.stack(centres),
        temperature=temperature,
        distance_power=distance_power,
    )


def _fixed(run: Run, names: Sequence[str], weights: Mapping[str, float]) -> np.ndarray:
    unknown = [name for name in weights if name not in names]
    if unknown:
        registry = run.registry()
        if unknown[0] in registry.retired():
            registry.in_use(unknown[0])  # says how it comes back
        raise UserError(
            f"there is no published expert {unknown[0]!r} to weigh; there are: {', '.join(names)}"
        )
    found = np.asarray([weights.get(name, 0.0) for name in names], float)
    if not (np.isfinite(found).all() and (found >= 0).all() and found.sum() > 0):
        given = ", ".join(f"{name}={weight}" for name, weight in weights.items())
        raise UserError(f"weights must be at least 0 and one of them above; got {given}")
    with np.errstate(divide="ignore"):
        return np.log(found / found.sum())


def _retired(registry: Registry, served: Collection[str]) -> dict[str, str]:
    """Language that only a retired expert serves -> name of that expert."""
    experts = [registry.expert(name) for name in registry.retired()]
    return {tag: each.name for each in experts for tag in each.languages if tag not in served}


def serving(experts: Sequence[Expert]) -> dict[str, int]:
    """Language -> index of the expert that serves it, of several that of the latest round, as
    `Registry.for_language` has it. The registry may have changed since `experts` were read."""
    tags = dict.fromkeys(tag for expert in experts for tag in expert.languages)
    rounds = {
        tag: [expert.round if tag in expert.languages else 0 for expert in experts] for tag in tags
    }
    return {tag: found.index(max(found)) for tag, found in rounds.items()}
