"""Routers: how much each expert speaks at each token, from what came before it.

What a router knows of a text are two running sums: its *state*, to which each token adds a term of
its own, and, if it asks for it, the *evidence*, to which each token adds the log probabilities that
the experts gave it. The weights are a function of both. So those of all positions of a known text
come from one cumulative sum, those of a growing text cost one term a token, and both ways agree.
"""

from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int


class Router(Protocol):
    """Weighs E experts by states of Z numbers."""

    @property
    def experts(self) -> int:
        """E."""
        ...

    @property
    def memory(self) -> float:
        """What is left of the evidence after one more token, before that adds to it; 1 is all."""
        ...

    def start(self, language: str | None) -> Float[np.ndarray, " Z"]:
        """The state of a text that has not begun, in `language`, if that is known."""
        ...

    def terms(
        self, before: Int[np.ndarray, " _"], ids: Int[np.ndarray, " T"]
    ) -> Float[np.ndarray, "T Z"]:
        """What each of these ids adds to the state, after those of the same text `before`."""
        ...

    def asks(self, states: Float[np.ndarray, "T Z"]) -> Bool[np.ndarray, " T"]:
        """Whether the weights depend on the evidence, for which every expert reads the text."""
        ...

    def log_weights(
        self, states: Float[np.ndarray, "T Z"], evidence: Float[np.ndarray, "T E"]
    ) -> Float[np.ndarray, "T E"]:
        """Normalised. The evidence is zero where it was not asked for."""
        ...

    def decided_by(self, states: Float[np.ndarray, "T Z"]) -> list[str]:
        """The name of the router that decides each row of `log_weights`, of those that are one
        within the other: one of `routers.ROUTINGS`, or the model that a router abstains to."""
        ...


def states_along(
    router: Router,
    start: Float[np.ndarray, " Z"],
    ids: Int[np.ndarray, " T"],
    mask: Bool[np.ndarray, " T"] | None = None,
) -> Float[np.ndarray, "T1 Z"]:
    """The state before each token of a text and, as the last row, after all of them. mask: False
    for tokens that do not count, as those of a chat's template; None: all count."""
    if mask is not None:
        return states_along(router, start, ids[mask])[_counted(mask)]
    return np.cumsum(np.concatenate([start[None], router.terms(ids[:0], ids)]), axis=0)


def evidence_along(
    router: Router,
    scores: Float[np.ndarray, "E T"],
    mask: Bool[np.ndarray, " T"] | None = None,
) -> Float[np.ndarray, "T1 E"]:
    """The evidence before each token of a text and after all of them; `scores` are the log
    probabilities of its tokens by the experts. mask: as in `states_along`."""
    if mask is not None:
        return evidence_along(router, scores[:, mask])[_counted(mask)]
    sums = np.concatenate([np.zeros((1, len(scores))), scores.T.astype(float)])
    if router.memory == 1:
        return np.cumsum(sums, axis=0)
    for position in range(1, len(sums)):
        sums[position] += router.memory * sums[position - 1]
    return sums


def weights_along(
    router: Router,
    states: Float[np.ndarray, "T1 Z"],
    scores: Float[np.ndarray, "E T"],
    positions: Int[np.ndarray, " P"],
    top_m: int | None = None,
    least: float = 0.0,
    mask: Bool[np.ndarray, " T"] | None = None,
) -> Float[np.ndarray, "P E"]:
    """Log weights before each of these tokens of a text, as `keep_largest` leaves them, with the
    states along it and, where they are asked for, the experts' scores of it, of which those in
    `mask` count, as in `states_along`."""
    rows = states[positions]
    evidence, asks = np.zeros((len(positions), len(scores))), router.asks(rows)
    if asks.any():
        evidence = evidence_along(router, scores, mask)[positions]
    # Where all are asked for their evidence, leaving some out spares nothing.
    return keep_largest(router.log_weights(rows, evidence), top_m, np.where(asks, 0.0, least))


def _counted(mask: Bool[np.ndarray, " T"]) -> Int[np.ndarray, " T1"]:
    """How many tokens count before each one and, as the last number, in all."""
    return np.concatenate([[0], np.cumsum(mask)])


def keep_largest(
    log_weights: Float[np.ndarray, "T E"],
    count: int | None,
    least: Float[np.ndarray, " T"] | float = 0.0,
) -> Float[np.ndarray, "T E"]:
    """The `count` largest weights of each row (None: all) that are not below `least`, normalised
    again; the largest is always kept, and the first of equals wins."""
    experts = log_weights.shape[-1]
    if np.any(np.asarray(least) > 0):
        with np.errstate(divide="ignore"):
            floor = np.log(np.broadcast_to(least, log_weights.shape[:1]))[:, None]
        floor = np.minimum(floor, log_weights.max(axis=-1, keepdims=True))
        log_weights = normalised(np.where(log_weights < floor, -np.inf, log_weights))
    if count is None or count >= experts:
        return log_weights
    order = np.argsort(-log_weights, axis=-1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(experts), order.shape), axis=-1)
    return normalised(np.where(ranks < count, log_weights, -np.inf))


def among(log_weights: Float[np.ndarray, "T E"], models: int) -> Float[np.ndarray, "T M"]:
    """With no weight for the models behind those that a router weighs."""
    more = models - log_weights.shape[-1]
    return np.pad(log_weights, ((0, 0), (0, more)), constant_values=-np.inf)


def mixture(
    log_weights: Float[np.ndarray, "T E"], scores: Float[np.ndarray, "E T"]
) -> Float[np.ndarray, " T"]:
    """log sum_j w_j p_j at each token: a mixture of probabilities, in log space."""
    return logsumexp(log_weights + scores.T)[:, 0]


def normalised(log_weights):
    return log_weights - logsumexp(log_weights)


def logsumexp(values):
    """Over the last axis, kept. Some of each row are finite. (SciPy's takes ten times as long on
    the few experts of a token.)"""
    top = values.max(axis=-1, keepdims=True)
    return top + np.log(np.exp(values - top).sum(axis=-1, keepdims=True))
