"""Routing weights along a text: how much each expert counts at each token, by what came before.

A router knows two running sums of a text: its *state*, to which each token adds a term of its own,
and, if it needs them, the *log-likelihoods* that the experts gave to the tokens. The weights are a
function of both, so known texts take one cumulative sum, and growing texts one term a token."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from clustering.errors import UserError
from xelm.data.tokenizer import Tokenizer
from xelm.inference.routing import RoutingLimits

_NO_LIMITS = RoutingLimits()
IMPOSSIBLE = -1e4
"""Log-likelihood that routers count where an expert gives a token probability zero; finite, so that
one that forgets can forget it."""


CONTEXT = 16
"""Number of ids before a token that its term may depend on."""


class Router(Protocol):
    """Weighs E experts by states of Z numbers."""

    @property
    def experts(self) -> int:
        """Number of experts, E."""
        ...

    @property
    def memory(self) -> float:
        """Factor of the log-likelihoods so far at each further token; 1 keeps all."""
        ...

    def start(self, language: str | None) -> Float[np.ndarray, " Z"]:
        """The state before the first token of a text in `language`, if that is known."""
        ...

    def terms(
        self, before: Int[np.ndarray, " _"], ids: Int[np.ndarray, " T"]
    ) -> Float[np.ndarray, "T Z"]:
        """What each of these ids adds to the state, after those of the same text `before`, of which
        the last `CONTEXT` are enough."""
        ...

    def needs_log_likelihoods(self, states: Float[np.ndarray, "T Z"]) -> Bool[np.ndarray, " T"]:
        """Whether the weights depend on log-likelihoods, for which every expert reads the text."""
        ...

    def log_weights(
        self, states: Float[np.ndarray, "T Z"], log_likelihoods: Float[np.ndarray, "T E"]
    ) -> Float[np.ndarray, "T E"]:
        """Normalised log weights. The log-likelihoods are zero where they are not needed."""
        ...

    def decided_by(self, states: Float[np.ndarray, "T Z"]) -> list[str]:
        """The name of the router that decides each row of `log_weights`, where routers are nested:
        one of `routing.ROUTINGS`, or the model that a router abstains to."""
        ...


class Decision(NamedTuple):
    """Weights of M models before each of P tokens."""

    log_weights: Float[np.ndarray, "P M"]
    """Normalised; -inf for models that are not read."""
    routers: list[str]
    """The router that decided each row."""
    needed: Bool[np.ndarray, " P"]
    """Where the log-likelihoods of all experts were needed."""

    @property
    def router(self) -> str:
        """The router that decided most rows; the first of equals, "" if there is no row."""
        return Counter(self.routers).most_common(1)[0][0] if self.routers else ""


def decide(
    router: Router,
    states: Float[np.ndarray, "P Z"],
    log_likelihoods: Callable[[Bool[np.ndarray, " P"]], Float[np.ndarray, "P E"]],
    limits: RoutingLimits,
    models: int | None = None,
) -> Decision:
    """Weighs models by states of one or several texts. log_likelihoods: called once if any state
    needs them, with which states those are. models: M; None is E, otherwise models beyond the
    router's experts have no weight."""
    needed, given = router.needs_log_likelihoods(states), np.zeros((len(states), router.experts))
    if needed.any():
        given = log_likelihoods(needed)
    # Where all experts have read the text anyway, leaving some out of the mixture saves nothing.
    least = np.where(needed, 0.0, limits.least_weight)
    kept = keep_largest(router.log_weights(states, given), limits.top_m, least)
    return Decision(among(kept, models or router.experts), router.decided_by(states), needed)


class Walk:
    """A known text of T tokens, and the P places along it where a router weighs models."""

    def __init__(
        self,
        router: Router,
        language: str | None,
        ids: Int[np.ndarray, " T"],
        positions: Int[np.ndarray, " P"] | None = None,
        mask: Bool[np.ndarray, " T"] | None = None,
    ):
        """language: of the text, if it is known. positions: index of the state by which each weight
        is decided; None is before every token. mask: as in `states_along`."""
        self.router, self.mask = router, mask
        self.states = states_along(router, router.start(language), ids, mask)
        self.positions = np.arange(len(ids)) if positions is None else positions

    @property
    def known(self) -> int:
        """Number of tokens before the first place."""
        return int(self.positions.min()) if len(self.positions) else 0

    @property
    def needs_log_likelihoods(self) -> bool:
        """Whether all experts have to read the text before its weights are known."""
        return bool(self.router.needs_log_likelihoods(self.states[self.positions]).any())

    def decide(
        self,
        scores: Float[np.ndarray, "E T"],
        limits: RoutingLimits = _NO_LIMITS,
        models: int | None = None,
    ) -> Decision:
        """The weights at each position. scores: log probability of each token by each expert, read
        where the router needs them. models: as in the function `decide`."""

        def log_likelihoods(_: np.ndarray) -> np.ndarray:
            return log_likelihoods_along(self.router, scores, self.mask)[self.positions]

        return decide(self.router, self.states[self.positions], log_likelihoods, limits, models)


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


def log_likelihoods_along(
    router: Router, scores: Float[np.ndarray, "E T"], mask: Bool[np.ndarray, " T"] | None = None
) -> Float[np.ndarray, "T1 E"]:
    """The experts' log-likelihoods of a text before each token and after all of them, as far as the
    router remembers. scores: log probability of each token. mask: as in `states_along`."""
    if mask is not None:
        return log_likelihoods_along(router, scores[:, mask])[_counted(mask)]
    counted = np.maximum(scores.T.astype(float), IMPOSSIBLE)
    sums = np.concatenate([np.zeros((1, len(scores))), counted])
    if router.memory == 1:
        return np.cumsum(sums, axis=0)
    for position in range(1, len(sums)):
        sums[position] += router.memory * sums[position - 1]
    return sums


def routing_mask(
    tokenizer: Tokenizer,
    ids: Sequence[int] | Int[np.ndarray, " T"],
    user_mask: Sequence[bool] | None = None,
) -> Bool[np.ndarray, " T"]:
    """Which tokens of a prompt a router goes by: those in `user_mask` or, where that is None, all
    but the one that starts texts. UserError for a mask of another length."""
    if user_mask is None:
        return np.arange(len(ids)) >= tokenizer.starts(ids)
    if len(user_mask) != len(ids):
        raise UserError(f"a mask must be as long as its {len(ids)} ids; got {len(user_mask)}")
    return np.asarray(user_mask, bool)


def _counted(mask: Bool[np.ndarray, " T"]) -> Int[np.ndarray, " T1"]:
    """How many tokens count before each one and, as the last number, in all."""
    return np.concatenate([[0], np.cumsum(mask)])


def keep_largest(
    log_weights: Float[np.ndarray, "T E"],
    count: int | None,
    least: Float[np.ndarray, " T"] | float = 0.0,
) -> Float[np.ndarray, "T E"]:
    """The `count` largest weights of each row (None: all) that are not below `least`, normalised
    again. The largest is always kept; of equal ones the first."""
    experts = log_weights.shape[-1]
    if np.any(np.asarray(least) > 0):
        with np.errstate(divide="ignore"):
            floor = np.log(np.broadcast_to(least, log_weights.shape[:1]))[:, None]
        floor = np.minimum(floor, log_weights.max(axis=-1, keepdims=True))
        log_weights = normalised(np.where(log_weights < floor, -np.inf, log_weights))
    if count is None or count >= experts:
        return log_weights
    order = np.argsort(-log_weights, axis=-1, kind="stable")
    ranks = np.argsort(order, axis=-1)
    return normalised(np.where(ranks < count, log_weights, -np.inf))


def among(log_weights: Float[np.ndarray, "T E"], models: int) -> Float[np.ndarray, "T M"]:
    """The same weights of the first E of M models, and none of the others."""
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
    """log sum exp over the last axis, which is kept; each row has a finite value. (SciPy's function
    takes ten times as long on the few experts of a token.)"""
    top = values.max(axis=-1, keepdims=True)
    return top + np.log(np.exp(values - top).sum(axis=-1, keepdims=True))
