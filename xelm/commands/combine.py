"""The commands that train one model for all languages from the experts of a RUN."""

import argparse

from xelm.commands.options import (
    Command,
    add_budget,
    add_dry_run,
    add_fields,
    add_settings,
    given_fields,
    run_of,
    show,
)
from xelm.commands.training import print_plans
from xelm.inference.routing import ROUTINGS, Routing
from xelm.runs.options import DistilOptions, MixOptions


def _distil_options(parser: argparse.ArgumentParser) -> None:
    add_settings(
        parser,
        "change a setting for this command, such as experts.runtime.mesh_fsdp=4; may be repeated",
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        default="student",
        help="name of the model, which is RUN/students/NAME (default: %(default)s)",
    )
    add_budget(parser)
    add_dry_run(parser)
    add_fields(parser, DistilOptions, title="teacher")
    choices = {"name": [routing for routing in ROUTINGS if routing != "fixed"]}
    add_fields(
        parser, Routing, "name", title="routing", flags={"name": "--routing"}, choices=choices
    )


def _distil(options: argparse.Namespace) -> None:
    _set_budget(options)
    run = run_of(options)
    given = DistilOptions(**given_fields(options, DistilOptions))
    routing = Routing(**given_fields(options, Routing))
    if options.dry_run:
        plan = run.plan_distil(options.name, given, routing)
        print_plans(options, [plan], last="Nothing was written")
        return
    path = run.distil(options.name, given, routing)
    show(options, {"model": f"students/{options.name}", "out": str(path)}, path)


def _mix_options(parser: argparse.ArgumentParser) -> None:
    add_settings(
        parser,
        "change a setting for this command, such as experts.runtime.mesh_fsdp=4; may be repeated",
    )
    parser.add_argument(
        "--name", metavar="NAME", required=True, help="name of the model, which is RUN/mixes/NAME"
    )
    add_dry_run(parser)
    add_fields(parser, MixOptions, title="mixture")


def _mix(options: argparse.Namespace) -> None:
    from xelm.config import check_changeable

    check_changeable(options.settings, "experts")
    run, given = run_of(options), MixOptions(**given_fields(options, MixOptions))
    if options.dry_run:
        plan = run.plan_mix(options.name, given)
        print_plans(options, [plan], last="Nothing was written")
        return
    path = run.mix(options.name, given)
    show(options, {"model": f"mixes/{options.name}", "out": str(path)}, path)


MIX = Command(
    "make one mixture of experts of the experts, in the architecture of Mixtral",
    _mix,
    _mix_options,
)


def _set_budget(options: argparse.Namespace) -> None:
    """Adds the settings that `--tokens` or `--passes` stands for: the model reads what the dense
    baseline would read with these."""
    from xelm.config import check_changeable

    check_changeable(options.settings, "experts")
    if options.tokens is not None:
        options.settings += [f"experts.tokens={options.tokens}", "experts.passes=null"]
    if options.passes is not None:
        options.settings.append(f"experts.passes={options.passes}")


DISTIL = Command(
    "train one model for all languages to predict what the ensemble predicts",
    _distil,
    _distil_options,
)
