"""The command that merges models into one."""

import argparse

from experts.merge_methods import METHODS, MergeOptions, Method, parameters_of
from xelm.commands.options import Command, add_fields, given_fields, names, run_of, show


def _merge_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names",
        nargs="*",
        metavar="MODEL",
        help="expert (NAME, or NAME@v1 for a version), seed, dense, merges/NAME, or directory of a "
        "checkpoint of the same shape and vocabulary (default: all published experts)",
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "--name",
        metavar="NAME",
        help="make it a model of the RUN, RUN/merges/NAME, which xelm evaluate measures beside the "
        "others",
    )
    place.add_argument("--out", metavar="DIR", help="write it into this directory instead")
    parser.add_argument(
        "--weights",
        type=_weights,
        default="equal",
        metavar="W,W,...",
        help="a number for each model; or equal; or share, that of an expert's languages in the "
        "text; or held-out, the share of the seed's bits a byte that an expert saves on held-out "
        "text of its languages (default: equal)",
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="model from which differences are taken (default: seed)"
    )
    add_fields(parser, MergeOptions, title="method", choices={"method": tuple(METHODS)})
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "methods:\n" + "\n".join(_lines(*each) for each in METHODS.items())


def _lines(name: str, method: Method) -> str:
    """Three lines of the table of methods."""
    models = {None: "", 2: "two models; "}[method.most]
    takes = ["--weights"] if method.has_weights else []
    takes += ["--base"] if method.has_base else []
    takes += [
        f"--{key.replace('_', '-')} ({value:g})" for key, value in parameters_of(method).items()
    ]
    return f"  {name:17}{method.summary}\n{'':19}{models}{', '.join(takes)}\n{'':19}{method.paper}"


def _weights(text: str) -> str | tuple[float, ...]:
    """Numbers, or the name of weights that are computed."""
    parts = names(text)
    try:
        return tuple(map(float, parts))
    except ValueError:
        return text


def _merge(options: argparse.Namespace) -> None:
    merged = run_of(options).merge(
        *options.names,
        options=MergeOptions(**given_fields(options, MergeOptions)),
        weights=options.weights,
        base=options.base,
        name=options.name,
        out=options.out,
    )
    show(options, {"out": str(merged.path), "weights": merged.weights}, merged.path)


MERGE = Command("merge experts into one model, by a published method", _merge, _merge_options)
