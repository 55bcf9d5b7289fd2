"""`xelm serve`: an HTTP server of the ensemble."""

import argparse

from xelm.commands.options import Command, add_fields, given_fields, run_of
from xelm.commands.routing import add_routing, routing_of
from xelm.serving.limits import Limits


def _serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port",
        type=int,
        default=8000,
        metavar="N",
        help="port to listen on; 0 takes a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="file with the API key that requests must have (default: the variable XELM_API_KEY, "
        "if it is set)",
    )
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages that may send requests, such as https://example.org; may be given several "
        "times (default: none but the server's own page)",
    )
    names = ("max_tokens", "max_seconds", "max_sequences", "max_waiting")
    add_fields(parser, Limits, *names, title="limits")
    add_routing(parser, "route_per")


def _serve(options: argparse.Namespace) -> None:
    from xelm.process import return_freed_memory
    from xelm.serving.server import serve

    return_freed_memory()
    serve(
        run_of(options),
        routing_of(options),
        dtype=options.dtype,
        host=options.host,
        port=options.port,
        key_file=options.api_key_file,
        origins=options.cors_origin,
        limits=Limits(**given_fields(options, Limits)),
    )


SERVE = Command(
    "serve the ensemble over HTTP, with the interfaces of OpenAI",
    _serve,
    _serve_options,
    json=False,
)
