"""The command that takes a model out of a RUN."""

import argparse
import dataclasses

from clustering.errors import UserError
from xelm.commands.options import Command, run_of, show


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        metavar="NAME",
        help="expert, NAME@vN for a certain version of it, seed, dense, merges/NAME, "
        "students/NAME, or mixes/NAME",
    )
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--out", metavar="DIR", help="directory for a copy of the checkpoint")
    form.add_argument(
        "--adapter",
        metavar="DIR",
        help="directory for an expert that was trained as an adapter, in the files of PEFT, as one "
        "adapter of the checkpoint that its chain of parents begins with",
    )
    form.add_argument(
        "--gguf",
        metavar="FILE",
        help="GGUF file for llama.cpp, written only if that makes the same ids of texts and the "
        "same greedy continuations (needs xelm[gguf] and llama.cpp's converter)",
    )
    parser.add_argument(
        "--converter",
        metavar="PATH",
        help="llama.cpp's convert_hf_to_gguf.py, or the folder that it is in (default: that of the "
        "environment variable LLAMA_CPP, or else on PATH)",
    )


def _export(options: argparse.Namespace) -> None:
    run = run_of(options)
    if options.gguf is None and options.converter is not None:
        raise UserError("--converter goes with --gguf")
    if options.adapter is not None:
        base = run.export_adapter(options.name, options.adapter)
        facts = {"name": options.name, "adapter": options.adapter, "base": str(base)}
        show(options, facts, f"{options.adapter}: an adapter of {base}")
        return
    if options.out is not None:
        out = run.export(options.name, options.out)
        show(options, {"name": options.name, "out": str(out)}, out)
        return
    assert options.gguf is not None  # one of the three is required
    made = run.export_gguf(options.name, options.gguf, options.converter)
    facts = {"name": options.name, **dataclasses.asdict(made), "file": str(made.file)}
    text = (
        f"{made.file}: weights in {made.dtype}; llama.cpp makes the same ids of {made.texts} texts "
        f"and continues {made.continuations} prompts by the same tokens"
    )
    show(options, facts, text)


EXPORT = Command("copy a model out of a RUN, as a checkpoint or for llama.cpp", _export, _options)
