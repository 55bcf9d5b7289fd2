"""`xelm serve`: an HTTP server of the ensemble."""

import argparse

from xelm.commands.options import Command, add_fields, given_fields, run_of
from xelm.commands.routing import add_routing, routing_of
from xelm.serving.limits import Access, Limits


def _serve_options(parser: argparse.ArgumentParser) -> None:
    add_fields(parser, Access, title="access", flags={"cors_origins": "--cors-origin"})
    add_fields(parser, Limits, title="limits")
    add_routing(parser, "route_per")


def _serve(options: argparse.Namespace) -> None:
    from xelm.process import return_freed_memory
    from xelm.serving.server import serve

    return_freed_memory()
    access = Access(**given_fields(options, Access))
    limits = Limits(**given_fields(options, Limits))
    serve(run_of(options), routing_of(options), access, limits, dtype=options.dtype)


SERVE = Command(
    "serve the ensemble over HTTP, with the interfaces of OpenAI",
    _serve,
    _serve_options,
    json=False,
)
