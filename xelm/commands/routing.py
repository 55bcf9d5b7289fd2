"""Options of the commands that run an ensemble: how a router weighs its experts."""

import argparse

from clustering.errors import UserError
from xelm.commands.options import add_fields, given_fields
from xelm.inference.routing import ROUTINGS, Routing
from xelm.models.config import WEIGHTS_DTYPES

FLAGS = {"name": "--routing", "temperature": "--router-temperature"}
FIELDS = (
    *("name", "top_m", "least_weight", "temperature", "distance_power", "memory", "weights"),
    *("abstain", "abstain_to"),
)


def add_routing(parser: argparse.ArgumentParser, *more: str) -> None:
    """Adds the options of routing and the data type. more: further fields of `Routing`."""
    # Text that is generated is routed by its prompt: there is no sequence before it.
    choices = {"name": ROUTINGS, "route_per": ("token", "prompt")}
    add_fields(parser, Routing, *FIELDS, *more, title="routing", flags=FLAGS, choices=choices)
    parser.add_argument(
        "--dtype",
        choices=("auto", *WEIGHTS_DTYPES),
        default="auto",
        help="data type of the weights in memory: float32, or bfloat16 with half and int8 with a "
        "quarter of its bytes (default: auto, that of the experts' weights; float32 on CPUs)",
    )


def add_language(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds the option `--language` for a text of this name."""
    parser.add_argument(
        "--language",
        metavar="XX",
        help=f"language of the {text}, as a code such as sw: an expert that serves it is run "
        "alone, whatever the routing (not with --routing fixed)",
    )


def routing_of(options: argparse.Namespace) -> Routing:
    """The routing that the options ask for; UserError for options without effect."""
    given = given_fields(options, Routing)
    if given.get("name") == "fixed":
        if "least_weight" in given:
            raise UserError("--least-weight has no effect on fixed weights; leave one of them out")
        if getattr(options, "language", None) is not None:
            raise UserError("--language has no effect on fixed weights; leave one of them out")
    return Routing(**given)
