"""The models that a server has at a time: those of a RUN alone, and its experts together."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clustering.errors import UserError
from xelm.inference.ensemble import Ensemble
from xelm.inference.parameter_cache import ParameterCache
from xelm.inference.route import Router, routing_mask, states_along
from xelm.inference.routers import Detected, Fixed
from xelm.inference.routing import Routing
from xelm.models.checkpoint import read_config
from xelm.runs.check import check_models, is_mixture
from xelm.runs.ensembles import open_ensemble, open_model, place_of, published
from xelm.runs.fit import identifier, pieces
from xelm.runs.make_router import general_models
from xelm.runs.run import Run

ENSEMBLE = "xelm"
"""Name of the ensemble; "xelm:NAME" is one model alone."""
_TOKENS_FOR_LANGUAGE = 200
"""Number of tokens of a prompt by which its language is detected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModels:
    """Models by name; an immutable value, which is replaced as a whole."""

    ensemble: Ensemble
    """All models of one shape: the experts, then the seed, the dense baseline and merged models."""
    alone: Mapping[str, Ensemble]
    """Models of another shape, mixtures of experts, each in a pool of its own, by name."""
    routers: Mapping[str, Router]
    """Name of a model in requests -> the router that weighs the models of its pool for it."""
    versions: Mapping[str, str]
    """Expert -> its version, such as "en-es@v2"."""
    places: Mapping[str, str]
    """Model -> its checkpoint, as by `place_of`."""
    retired: Collection[str]
    """Experts that are retired."""
    detector: Detected
    """Detects the language of prompts, which answers and metrics name."""
    max_characters: int
    """Length of the longest prompt that is tokenised: the models cannot read longer ones."""

    @property
    def parameters(self) -> ParameterCache:
        """Parameters of the models in memory."""
        assert isinstance(self.ensemble.parameters, ParameterCache)
        return self.ensemble.parameters

    @property
    def pools(self) -> dict[str | None, Ensemble]:
        """Pools by their key: the ensemble in the seed's vocabulary (None) and in further ones (by
        `Vocabulary.key`), and models of another shape (by name)."""
        further = {one.vocabulary.key: one for one in self.ensemble.further if one.vocabulary}
        return {None: self.ensemble, **further, **self.alone}

    def key_of(self, pool: Ensemble) -> str | None:
        """The key of one of the pools."""
        return next(key for key, one in self.pools.items() if one is pool)

    def router(self, model: str, key: str | None) -> Router | None:
        """The router for a model in requests, in the pool with this key; None if the model, or the
        pool, is not served any more."""
        pool = self.pools.get(key)
        if pool is None or model not in self.routers:
            return None
        return pool.router if model == ENSEMBLE else self.routers[model]

    def evict_others(self) -> None:
        """Drops parameters in the same memory that only models served earlier use."""
        caches = (pool.parameters for pool in self.pools.values())
        self.parameters.evict_others(*(c for c in caches if isinstance(c, ParameterCache)))

    def language_of(
        self,
        ids: Sequence[int],
        user_mask: Sequence[bool] | None = None,
        pool: Ensemble | None = None,
    ) -> str | None:
        """The most probable language of a prompt, by its first ids in `user_mask` (as in
        `Request`); None where there are none but the token that starts texts. pool: the one in
        whose vocabulary it is; None: the ensemble, in the seed's."""
        mask = routing_mask(self.ensemble.tokenizer, ids, user_mask)
        counted = np.asarray(ids, np.int64)[mask]
        if pool is not None and pool.vocabulary is not None:
            counted = pool.vocabulary.expand(counted)
        counted = counted[:_TOKENS_FOR_LANGUAGE]
        if not len(counted):
            return None
        states = states_along(self.detector, self.detector.start(None), counted)
        found = self.detector.languages(states[-1:])[0]
        return self.detector.identifier.languages[int(found.argmax())]


def open_served_models(
    run: Run,
    routing: Routing,
    *,
    dtype: str = "auto",
    before: ServedModels | None = None,
    report: Callable[[str], object] = lambda stage: None,
) -> ServedModels:
    """The models that a RUN has now. UserError for encoders, and if the files of a model are not
    those that were published or contain NaN or infinity.

    before: the models served until now, with which parameters that stay are shared, and which are
    returned if the RUN has the same ones, with the same files. report: called with what is being
    done, such as "expert 3 of 8"."""
    experts = published(run)
    versions = {expert.name: expert.reference for expert in experts}
    mixtures = [name for name in run.combined() if is_mixture(name)]
    others = general_models(run) | run.combined()
    check_models(run, experts, others, report=report)
    report("routers")
    paths = {expert.name: expert.directory(run.directory) for expert in experts} | others
    places = {name: place_of(path) for name, path in paths.items()}
    if before is not None and (before.versions, before.places) == (versions, places):
        return before
    if not read_config(run.seed).causal:
        raise UserError(f"{run.directory} has encoders, which generate no text: nothing to serve")
    ensemble = open_ensemble(
        run,
        routing,
        experts=experts,  # the registry may change meanwhile
        every_model=True,
        dtype=dtype,
        before=before and before.ensemble,
    )
    assert isinstance(ensemble.parameters, ParameterCache)
    alone = {
        name: open_model(run, name, dtype=dtype, cache=ensemble.parameters) for name in mixtures
    }
    names = ensemble.names
    log_weights = np.where(np.eye(len(names)), 0.0, -np.inf)
    routers = {f"{ENSEMBLE}:{name}": Fixed(weights=one) for name, one in zip(names, log_weights)}
    routers |= {f"{ENSEMBLE}:{name}": pool.router for name, pool in alone.items()}
    named = pieces(run)
    tokens = [named, *(pool.tokenizer.hub.get_vocab() for pool in ensemble.further)]
    longest = max(len(token) for each in tokens for token in each)
    return ServedModels(
        ensemble=ensemble,
        alone=alone,
        routers={ENSEMBLE: ensemble.router} | routers,
        versions=versions,
        places=places,
        retired=run.registry().retired(),
        detector=Detected(experts=1, identifier=identifier(run), pieces=named, serving={}),
        # Twice what the longest tokens give, since some characters become no token.
        max_characters=2 * longest * ensemble.longest,
    )
