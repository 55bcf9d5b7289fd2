"""The commands that make experts without training: of a model from elsewhere, and smaller ones."""

import argparse
from typing import TYPE_CHECKING, Any

from xelm.commands.options import (
    Command,
    add_corpus,
    add_fields,
    add_languages,
    add_workers,
    corpus_of,
    given_fields,
    run_of,
    show,
    workers_of,
)
from xelm.runs.options import AdoptOptions, CompressOptions

if TYPE_CHECKING:
    from experts.expert import Expert


def _adopt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="directory of a checkpoint of the Hub (config.json and safetensors) of the shape and "
        "vocabulary of the RUN's models, or of a LoRA adapter of PEFT for one of them",
    )
    add_languages(
        parser, "languages that it serves; may be left out for the next version of an expert"
    )
    add_corpus(
        parser,
        "text in these languages, by which routers find the expert, and of which a part is held "
        "out to compare it with its parent (default: the RUN's, if it has any)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the checkpoint, print what was found, and change nothing",
    )
    add_workers(parser)
    add_fields(parser, AdoptOptions, "name", "parent", title="expert")


def _adopt(options: argparse.Namespace) -> None:
    run, corpus = run_of(options), corpus_of(options)
    given = AdoptOptions(**given_fields(options, AdoptOptions), workers=workers_of(options))
    arguments = (options.checkpoint, options.languages or (), corpus, given)
    if options.dry_run:
        found = run.plan_adoption(*arguments)
        facts = {"expert": _facts(found.expert), "checks": found.checks}
        lines = [f"{what}: {line}" for what, line in found.checks.items()]
        last = f"{found.expert.reference} would be a child of {found.expert.parent}; nothing was "
        show(options, facts, "\n".join([*lines, f"{last}changed"]))
        return
    expert = run.adopt(*arguments)
    origin = f"adopted from {options.checkpoint}, a child of {expert.parent}"
    show(options, _facts(expert), f"{expert.reference} {origin}{_figures(expert)}")


def _facts(expert: "Expert") -> dict[str, Any]:
    """Returns the record of an expert for --json, without its hashes."""
    return {key: value for key, value in expert.to_json().items() if key != "sha256"}


def _figures(expert: "Expert") -> str:
    """What an expert has on held-out text beside its parent, as the end of a line."""
    own = (expert.evaluation or {}).get("own", {})
    shown = [
        f"{bits['expert']:.3f} in {tag} (parent {bits['parent']:.3f}, seed {bits['seed']:.3f})"
        for tag, bits in own.items()
    ]
    return f"; bits a byte on held-out text: {', '.join(shown)}" if shown else ""


ADOPT = Command("make an expert of a checkpoint that was trained elsewhere", _adopt, _adopt_options)


def _compress_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="expert whose next version is made")
    fields = ("rank", "energy", "revert")
    add_fields(parser, CompressOptions, *fields, title="what is stored of its difference")


def _compress(options: argparse.Namespace) -> None:
    given = CompressOptions(**given_fields(options, CompressOptions))
    expert = run_of(options).compress(options.name, given)
    made = expert.made or {}
    facts = _facts(expert)
    show(options, facts, f"{expert.reference} compressed from {made['from']}{_figures(expert)}")


COMPRESS = Command(
    "make a smaller version of an expert: a low rank, or fewer layers", _compress, _compress_options
)
