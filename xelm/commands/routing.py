"""Who speaks: what the verbs that ask the ensemble share."""

import argparse
import sys
from typing import Any

from clustering.errors import UserError
from xelm.commands.options import names
from xelm.inference.routing import DEFAULT, ROUTINGS


def add_routing(parser: argparse.ArgumentParser, text: str) -> None:
    """The options `--routing` and `--language`, of a text."""
    parser.add_argument(
        "--routing",
        choices=ROUTINGS,
        default=DEFAULT,
        help="how the experts are weighed (default: %(default)s)",
    )
    parser.add_argument(
        "--language",
        metavar="XX",
        help=f"language of the {text}: if an expert serves it, that expert alone is asked, "
        "whatever the routing (but for fixed weights)",
    )


def check_language(options: argparse.Namespace) -> None:
    """UserError for a language beside weights that hold in every language."""
    if options.language is not None and options.routing == "fixed":
        raise UserError("--language has no effect on fixed weights; leave one of the two out")


def report_routing(language: str | None, routing: str) -> None:
    """Says on stderr that no expert serves a language that was given, and which router decided
    instead."""
    if language is not None and routing != "language":
        print(f"no expert serves {language}: routed by {routing} instead", file=sys.stderr)


def add_route_per(parser: argparse.ArgumentParser) -> None:
    """When the router decides, of what generates."""
    parser.add_argument(
        "--route-per",
        choices=("token", "prompt"),
        default="token",
        help="when the router decides: before every token (default), or once after the prompt",
    )


def add_router(parser: argparse.ArgumentParser) -> None:
    """The options of routers, and the dtype."""
    add_kept(parser)
    add_temperature(parser)
    parser.add_argument(
        "--distance-power",
        type=float,
        metavar="P",
        help="exponent of distances in TF-IDF routing (default: 2; the authors' code has 4)",
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="X",
        help="memory of posterior routing: a token counts by this to the power of how far it lies "
        "back (default: 1, which forgets nothing)",
    )
    parser.add_argument(
        "--weights",
        type=_weights,
        metavar="A=X,B=Y",
        help="weights of experts by name, for fixed routing",
    )
    parser.add_argument(
        "--abstain",
        type=float,
        metavar="X",
        help="largest weight of an expert below which --abstain-to decides instead",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="number format of parameters and matrix products (default: auto, that of the experts' "
        "weights; float32 on CPUs)",
    )
    parser.add_argument(
        "--abstain-to",
        choices=("posterior", "seed", "dense"),
        default="posterior",
        help="what decides where --abstain says so (default: %(default)s)",
    )


def add_kept(parser: argparse.ArgumentParser) -> None:
    """Which experts are asked."""
    parser.add_argument(
        "--top-m",
        type=int,
        metavar="M",
        help="most experts that are asked at each token (default: all that have weight)",
    )
    parser.add_argument(
        "--least-weight",
        type=float,
        metavar="X",
        help="weight below which an expert is not asked (default: 0.001)",
    )


def add_temperature(parser: argparse.ArgumentParser) -> None:
    """Of TF-IDF routing."""
    parser.add_argument(
        "--router-temperature",
        type=float,
        metavar="X",
        help="temperature of TF-IDF routing; small trusts the nearest expert alone (default: .1)",
    )


def _weights(text: str) -> dict[str, float]:
    """Of "en=.7,de=.3"."""
    found = {}
    for part in names(text):
        name, separator, weight = part.partition("=")
        try:
            found[name] = float(weight)
        except ValueError:
            separator = ""
        if not separator:
            raise argparse.ArgumentTypeError(f"weights such as en=.7,de=.3 wanted; got {part!r}")
    return found


def router_options(options: argparse.Namespace) -> dict[str, Any]:
    """Of `add_router`, as `Run.ensemble` and `routers.Routing` name them."""
    kept = {} if options.least_weight is None else {"least_weight": options.least_weight}
    if kept and options.routing == "fixed":
        raise UserError("--least-weight is of no use to fixed weights: whoever has one is asked")
    return {
        **kept,
        "top_m": options.top_m,
        "temperature": options.router_temperature,
        "distance_power": options.distance_power,
        "memory": options.memory,
        "weights": options.weights,
        "abstain": options.abstain,
        "abstain_to": options.abstain_to,
    }
