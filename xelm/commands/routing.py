"""Who speaks: what the verbs that ask the ensemble share."""

import argparse
import sys
from typing import Any

from clustering.errors import UserError
from xelm.commands.options import names

ROUTINGS = ("language", "detected", "tfidf", "learned", "posterior", "uniform", "fixed")
ROUTING = "learned"
"""Unless another is asked for; `routers.Routing` says why."""


def add_routing(verb: argparse.ArgumentParser, text: str) -> None:
    """The options `--routing` and `--language`, of a text."""
    verb.add_argument(
        "--routing",
        choices=ROUTINGS,
        default=ROUTING,
        help="how the experts are weighed (default: %(default)s)",
    )
    verb.add_argument(
        "--language",
        metavar="XX",
        help=f"of the {text}: if an expert serves it, that expert alone is asked, whatever the "
        "routing (but for fixed weights)",
    )


def check_language(options: argparse.Namespace) -> None:
    """UserError for a language beside weights that hold in every language."""
    if options.language is not None and options.routing == "fixed":
        raise UserError("--language has no effect on fixed weights; leave one of the two out")


def tell_routing(language: str | None, routing: str) -> None:
    """Says on stderr that no expert serves a language that was given, and which router decided
    instead."""
    if language is not None and routing != "language":
        print(f"no expert serves {language}: routed by {routing} instead", file=sys.stderr)


def add_route_per(verb: argparse.ArgumentParser) -> None:
    """When the router decides, of what generates."""
    verb.add_argument(
        "--route-per",
        choices=("token", "prompt"),
        default="token",
        help="when the router decides: before every token (default), or once after the prompt",
    )


def add_router(verb: argparse.ArgumentParser) -> None:
    """The options of routers, and the dtype."""
    add_kept(verb)
    add_temperature(verb)
    verb.add_argument(
        "--distance-power",
        type=float,
        metavar="P",
        help="of TF-IDF routing (default: 2; the authors' code has 4)",
    )
    verb.add_argument(
        "--memory",
        type=float,
        metavar="X",
        help="of the posterior: a token counts by this to the power of how far it lies back",
    )
    verb.add_argument(
        "--weights", type=_weights, metavar="A=X,B=Y", help="of experts, for fixed routing"
    )
    verb.add_argument(
        "--abstain",
        type=float,
        metavar="X",
        help="leave it to others where no expert's weight reaches this",
    )
    verb.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of parameters and products (default: float32)",
    )
    verb.add_argument(
        "--abstain-to",
        choices=("posterior", "seed", "dense"),
        default="posterior",
        help="to whom (default: posterior)",
    )


def add_kept(verb: argparse.ArgumentParser) -> None:
    """Which experts are asked."""
    verb.add_argument("--top-m", type=int, metavar="M", help="experts asked at each token")
    verb.add_argument(
        "--least-weight",
        type=float,
        default=0.001,
        metavar="X",
        help="experts with less are not asked (default: %(default)s)",
    )


def add_temperature(verb: argparse.ArgumentParser) -> None:
    """Of TF-IDF routing."""
    verb.add_argument(
        "--router-temperature",
        type=float,
        metavar="X",
        help="of TF-IDF routing; small trusts the nearest expert alone",
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
    return {
        "top_m": options.top_m,
        "least_weight": options.least_weight,
        "temperature": options.router_temperature,
        "distance_power": options.distance_power,
        "memory": options.memory,
        "weights": options.weights,
        "abstain": options.abstain,
        "abstain_to": options.abstain_to,
    }
