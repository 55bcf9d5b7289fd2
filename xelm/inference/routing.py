"""Options of routing, as plain values. Imports nothing heavy, so that flags can be made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from clustering.errors import UserError

ROUTINGS: Sequence[str] = (
    *("language", "detected", "tfidf", "learned", "posterior", "uniform", "fixed"),
)
DEFAULT = "learned"
"""Routing of an ensemble unless another is requested. The paper's is TF-IDF; this one is learned
from the same vectors, is right more often and reads fewer experts (docs/inference.md)."""
TEMPERATURE, DISTANCE_POWER = 0.1, 2.0
"""Defaults of TF-IDF routing; the authors' code has .1 and 4."""

RoutePer = Literal["token", "prompt", "sequence"]
AbstainTo = Literal["posterior", "seed", "dense"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How many of the experts that a router weighs are read, and how often it decides."""

    top_m: int | None = None
    """Number of experts that are kept, those with the largest weights; None keeps all."""
    least_weight: float = 0.0
    """Weight below which an expert is left out; 0 keeps all that have any."""
    route_per: RoutePer = "token"
    """When the router decides: before every token; once, after the prompt (or context); or once for
    a text that is scored, by all of it (a text that is generated is routed by its prompt)."""

    def __post_init__(self) -> None:
        if self.route_per not in get_args(RoutePer):
            raise UserError(
                f"route_per must be one of {', '.join(get_args(RoutePer))}; got {self.route_per!r}"
            )
        if not 0 <= self.least_weight < 1:
            raise UserError(
                f"the least weight must be at least 0 and below 1; got {self.least_weight}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing(Limits):
    """Which router weighs the experts, and how. None stands for the router's default."""

    name: str = DEFAULT
    """Router, one of `ROUTINGS`."""
    least_weight: float = 0.001
    """Weight below which an expert is left out (not with fixed weights): its part of the mixture is
    hardly more than that, and costs as much as any other's; 0 keeps all that have any."""
    temperature: float | None = None
    """Temperature of TF-IDF routing."""
    distance_power: float | None = None
    """Exponent of the distance in TF-IDF routing: 2, or 4 as in the authors' code."""
    memory: float | None = None
    """What the posterior keeps of its evidence after each token; below 1 it forgets."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of experts by name, for fixed routing; experts that are not named have none."""
    abstain: float | None = None
    """Largest weight below which the router leaves the decision to `abstain_to`."""
    abstain_to: AbstainTo = "posterior"
    """The router or model that takes over then."""

    def __post_init__(self) -> None:
        Limits.__post_init__(self)
        if self.name not in ROUTINGS:
            raise UserError(f"routing must be one of {', '.join(ROUTINGS)}; got {self.name!r}")
        for option, value, home in (
            ("temperature", self.temperature, "tfidf"),
            ("distance power", self.distance_power, "tfidf"),
            ("memory", self.memory, "posterior"),
            ("weights", self.weights or None, "fixed"),
        ):
            if value is not None and self.name != home:
                raise UserError(f"a router's {option} goes with routing {home}; got {self.name}")
        if self.name == "tfidf":
            check_tfidf(*self.tfidf)
        if self.name == "fixed" and not self.weights:
            raise UserError("fixed routing wants weights of experts, such as --weights en=.7,de=.3")
        if self.abstain is not None and not 0 <= self.abstain <= 1:
            raise UserError(f"a threshold must be between 0 and 1; got {self.abstain}")
        if self.abstain_to not in get_args(AbstainTo):
            raise UserError(
                f"abstaining goes to one of {', '.join(get_args(AbstainTo))}; "
                f"got {self.abstain_to!r}"
            )
        if self.abstain is None and self.abstain_to != "posterior":
            raise UserError(f"abstaining to {self.abstain_to} needs abstain, a threshold")
        if self.abstain is not None and self.name in ("posterior", "language"):
            raise UserError(f"abstaining goes with other routings than {self.name}")

    @property
    def tfidf(self) -> tuple[float, float]:
        """Temperature and distance power of TF-IDF."""
        power = DISTANCE_POWER if self.distance_power is None else self.distance_power
        return TEMPERATURE if self.temperature is None else self.temperature, power


def check_tfidf(temperature: float, distance_power: float) -> None:
    """Raises UserError for values that TF-IDF routing cannot use."""
    if not temperature > 0 or not distance_power > 0:
        raise UserError(
            "TF-IDF routing wants a temperature and a distance power above 0; got "
            f"{temperature} and {distance_power}"
        )
