"""Routers are fitted when experts are published, so that nobody waits for it later."""

import sys

import jax

from clustering.errors import UserError
from xelm.inference.routing import Routing
from xelm.runs.make_router import OR_MIXTURE, make_router
from xelm.runs.run import Run
from xelm.training import hosts


def fit_routers(run: Run) -> None:
    """Fits the routers over the published experts that are fitted on the text of the RUN and are
    not fitted yet, and keeps them in the RUN."""
    experts = run.registry().published()
    if not experts or not run.has_text:
        return
    for name in OR_MIXTURE:
        if name != "detected" or any(expert.languages for expert in experts):
            make_router(run, experts, Routing(name=name))


def fit_published(run: Run) -> None:
    """`fit_routers`, after experts were published, unless experts of clusters are still to be
    trained: whoever publishes the last of them does it. Where a router cannot be fitted, a line on
    stderr says why; no expert depends on it, and whoever first needs one fits it."""
    # Not asked of a process that is alone, which would start the devices that others may be using.
    other_host = jax.distributed.is_initialized() and not hosts.is_first()
    if run.untrained() or other_host:
        return
    try:
        fit_routers(run)
    except (UserError, OSError) as error:
        print(f"routers are not fitted now, but when they are needed: {error}", file=sys.stderr)
