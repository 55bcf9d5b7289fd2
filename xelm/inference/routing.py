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
"""When a router decides. With "sequence", a text that is scored is routed once, by all of it, and a
text that is generated is routed by its prompt."""
AbstainTo = Literal["posterior", "seed", "dense"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingLimits:
    """How many of the experts that a router weighs are read, and how often it decides."""

    top_m: int | None = None
    """Largest number of experts that are run at each token, those with the largest weights. None:
    all that have weight."""
    least_weight: float = 0.0
    """Weight below which an expert is not run; 0 runs all that have any weight."""
    route_per: RoutePer = "token"
    """When the router decides: before every token, or once after the prompt (or context)."""

    def __post_init__(self) -> None:
        if self.route_per not in get_args(RoutePer):
            raise UserError(
                f"route_per must be one of {', '.join(get_args(RoutePer))}; got {self.route_per!r}"
            )
        if not 0 <= self.least_weight < 1:
            raise UserError(f"least_weight must be at least 0 and below 1; got {self.least_weight}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing(RoutingLimits):
    """Which router weighs the experts, and how. None stands for the router's default."""

    name: str = DEFAULT
    """Router that weighs the experts; docs/inference.md compares them."""
    least_weight: float = 0.001
    """Weight below which an expert is not run (except for fixed weights), since it costs as much as
    any other; 0 runs all that have any weight."""
    temperature: float | None = None
    """Temperature of TF-IDF routing; a low one trusts the nearest expert alone. None: 0.1."""
    distance_power: float | None = None
    """Exponent of distances in TF-IDF routing; the authors' code has 4. None: 2."""
    memory: float | None = None
    """Factor by which posterior routing discounts its evidence at each token. None: 1, which
    forgets nothing."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of experts by name for fixed routing, such as en=.7,de=.3; all others have none."""
    abstain: float | None = None
    """Threshold: where no expert has a larger weight, `abstain_to` decides instead of the router.
    None: the router always decides."""
    abstain_to: AbstainTo = "posterior"
    """Router or model that decides where the router abstains."""

    def __post_init__(self) -> None:
        RoutingLimits.__post_init__(self)
        if self.name not in ROUTINGS:
            raise UserError(f"routing must be one of {', '.join(ROUTINGS)}; got {self.name!r}")
        for option, value, home in (
            ("temperature", self.temperature, "tfidf"),
            ("distance_power", self.distance_power, "tfidf"),
            ("memory", self.memory, "posterior"),
            ("weights", self.weights or None, "fixed"),
        ):
            if value is not None and self.name != home:
                raise UserError(f"{option} goes with routing {home}; got {self.name}")
        if self.name == "tfidf":
            check_tfidf(*self.tfidf)
        if self.name == "fixed" and not self.weights:
            raise UserError("fixed routing needs weights of experts, such as --weights en=.7,de=.3")
        if self.abstain is not None and not 0 <= self.abstain <= 1:
            raise UserError(f"abstain must be between 0 and 1; got {self.abstain}")
        if self.abstain_to not in get_args(AbstainTo):
            raise UserError(
                f"abstaining goes to one of {', '.join(get_args(AbstainTo))}; "
                f"got {self.abstain_to!r}"
            )
        if self.abstain is None and self.abstain_to != "posterior":
            raise UserError("abstain_to has no effect without abstain, a threshold")
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
