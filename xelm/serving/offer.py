"""What a server offers at a time: every published expert of a RUN, alone and together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clustering.errors import UserError
from xelm.inference.ensemble import Ensemble
from xelm.inference.route import Router, routing_mask, states_along
from xelm.inference.routers import Detected, Fixed
from xelm.inference.routing import Routing
from xelm.models.checkpoint import read_config
from xelm.runs.ensembles import open_ensemble, published
from xelm.runs.fitted import identifier, pieces
from xelm.runs.run import Run

ENSEMBLE = "xelm"
"""The name of the ensemble; "xelm:NAME" is one model alone."""
_HEARD = 200
"""Tokens of a text by which its language is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """Models by name, and what they are made of. Never changes: another takes its place."""

    ensemble: Ensemble
    """All models: the experts, then those that are no experts."""
    routers: Mapping[str, Router]
    """Name of a model, as requests have it -> who speaks."""
    versions: Mapping[str, str]
    """Expert -> its version, such as "en-es@v2"."""
    detector: Detected
    """Tells languages, for counting and for show."""

    @property
    def most_characters(self) -> int:
        """Of a text that the models may be able to read: nobody need cut others into ids. Twice
        over, since some characters become nothing."""
        longest = max(map(len, self.detector.pieces), default=1)
        return 2 * longest * self.ensemble.longest

    def language_of(
        self, ids: Sequence[int], user_mask: Sequence[bool] | None = None
    ) -> str | None:
        """The probable language of a text that begins with these ids, by those in `user_mask`, as
        `Engine.add` has it; None of one that is empty but for the token that starts texts."""
        counts = routing_mask(self.ensemble.tokenizer, ids, user_mask)
        heard = np.asarray(ids, np.int64)[counts][:_HEARD]
        if not len(heard):
            return None
        states = states_along(self.detector, self.detector.start(None), heard)
        found = self.detector.languages(states[-1:])[0]
        return self.detector.identifier.languages[int(found.argmax())]


def open_offer(
    run: Run, routing: Routing, *, dtype: str = "auto", before: Offer | None = None
) -> Offer:
    """What a RUN has to offer now. before: what was offered until now, with which it shares the
    parameters that stay. UserError if the files of a model are not those that were published, or
    hold no numbers."""
    experts = published(run)
    if not read_config(run.seed).causal:
        raise UserError(
            f"{run.directory} has encoders, which continue no text; there is no serving"
        )
    ensemble = open_ensemble(
        run, routing, every_model=True, dtype=dtype, before=before and before.ensemble
    )
    names = ensemble.names
    alone = {f"{ENSEMBLE}:{name}": _alone(n, len(names)) for n, name in enumerate(names)}
    return Offer(
        ensemble=ensemble,
        routers={ENSEMBLE: ensemble.router} | alone,
        versions={expert.name: expert.reference for expert in experts},
        detector=Detected(experts=1, identifier=identifier(run), pieces=pieces(run), serving={}),
    )


def _alone(place: int, models: int) -> Fixed:
    weights = np.full(models, -np.inf)
    weights[place] = 0.0
    return Fixed(weights=weights)
