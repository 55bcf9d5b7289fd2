"""The commands that make and train models: a RUN, its experts and the dense baseline."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from clustering.errors import UserError
from xelm.commands.options import (
    Command,
    add_corpus,
    add_dry_run,
    add_json,
    add_run,
    add_settings,
    add_workers,
    corpus_of,
    names,
    print_json,
    required_corpus,
)
from xelm.presets import PRESETS

if TYPE_CHECKING:
    from experts.expert import Expert
    from xelm.config import RunConfig
    from xelm.data.text_stats import TextStats
    from xelm.runs.budget import Plan
    from xelm.runs.run import Run

# Settings that have no effect where the seed is a given checkpoint.
_OF_FRESH_SEEDS = ("model", "seed.", "tokenizer_exponent")


def _quickstart_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        metavar="RUN",
        default="xelm-quickstart",
        help="directory to make (default: %(default)s)",
    )
    add_json(parser)


def _quickstart(options: argparse.Namespace) -> None:
    from xelm import tables
    from xelm.quickstart import NEW_LANGUAGES, quickstart

    run, results, page = quickstart(options.out)
    if options.json:
        print_json({"run": str(run.directory), "report": str(page), "results": results.record})
        return
    print(tables.results(results, ("language", "learned", "tfidf"), run.languages))
    print(f"\nReport: {page}\n\nNext:")
    print(f'  xelm generate {run.directory} "Der alte Mann" --routing language --language de')
    print(f"  xelm grow {run.directory} --language {NEW_LANGUAGES[1]}")
    print("  xelm init MY_RUN --corpus MY_CORPUS --preset tiny")


QUICKSTART = Command(
    "run every step on the embedded sample corpus, on a CPU, in minutes",
    _quickstart_options,
    _quickstart,
)


def _init_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="directory to make; one that was interrupted is resumed"
    )
    add_corpus(
        parser,
        "text to train on: a folder or file, such as <language>.jsonl or <language>/*.parquet; "
        "hf://owner/dataset[@revision][/config][:split]; or a .yaml file that lists several "
        "(docs/corpora.md)",
        required=True,
    )
    parser.add_argument(
        "--seed",
        metavar="HF_DIR",
        help="directory of a Hugging Face checkpoint "
        "to start from (default: a seed is trained on the corpus)",
    )
    parser.add_argument(
        "--base-model",
        metavar="OWNER/NAME",
        help="name of the seed on the Hub, for the model cards of its experts",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="configuration to start from (default: tiny, or hub with --seed); xelm config shows "
        "it",
    )
    parser.add_argument(
        "--languages",
        type=names,
        metavar="A,B,C",
        help="languages of the corpus to use (default: all)",
    )
    add_settings(
        parser, "change a setting of the configuration, such as experts.tokens=3e6; may be repeated"
    )
    parser.add_argument(
        "--clusters",
        metavar="DIR",
        help="record one expert for each of these clusters at once, as xelm branch does",
    )
    parser.add_argument(
        "--keep-duplicates",
        action="store_true",
        help="keep exact copies of documents (default: one of each is kept)",
    )
    add_dry_run(parser)
    add_workers(parser)
    add_json(parser)


def _init(options: argparse.Namespace) -> None:
    from clustering.clustering import Clustering
    from xelm import tables
    from xelm.config import override
    from xelm.data.text_stats import text_stats
    from xelm.runs.init import init

    unused = [s for s in options.settings if options.seed and s.startswith(_OF_FRESH_SEEDS)]
    if unused:
        raise UserError(
            f"{unused[0]} has no effect on a given seed: the checkpoint of --seed is used as it is"
        )
    preset = options.preset or ("hub" if options.seed else "tiny")
    config = override(PRESETS[preset](), options.settings)
    if options.dry_run:
        _plan_init(options, config)
        return
    run = init(
        options.run,
        required_corpus(options),
        config,
        seed=options.seed,
        languages=options.languages,
        clusters=Clustering.load(options.clusters) if options.clusters else None,
        workers=options.workers,
        keep_duplicates=options.keep_duplicates,
        base_model=options.base_model,
    )
    if options.json:
        print_json({"run": str(run.directory), "languages": run.store().record["languages"]})
        return
    print(tables.texts(list(text_stats(run.store()).values())))
    print(f"\nRUN: {run.directory}")


def _plan_init(options: argparse.Namespace, config: "RunConfig") -> None:
    from xelm.runs.init import plan_init

    plans, texts = plan_init(
        options.run,
        required_corpus(options),
        config,
        seed=options.seed,
        languages=options.languages,
        workers=options.workers,
        keep_duplicates=options.keep_duplicates,
    )
    _print_plans(options, plans, texts, f"Nothing was written to {options.run}")


def _print_plans(
    options: argparse.Namespace,
    plans: "Sequence[Plan]",
    texts: "Sequence[TextStats]" = (),
    last: str = "",
) -> None:
    """Prints what a dry run found to stdout, and warnings to stderr."""
    from xelm import tables
    from xelm.runs import budget

    for line in budget.warnings(plans):
        print(line, file=sys.stderr)
    if options.json:
        trainings = [dataclasses.asdict(plan) for plan in plans]
        print_json({"trainings": trainings, "texts": [text.to_json() for text in texts]})
        return
    parts = [tables.texts(texts)] if texts else []
    parts += [budget.table(plans) if plans else "no training is left to do"]
    print("\n\n".join([*parts, last] if last else parts))


INIT = Command("make a RUN: tokenizer, tokenised corpus and seed model", _init_options, _init)


def _branch_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--clusters", required=True, metavar="DIR", help="directory that xelm cluster wrote"
    )
    add_json(parser)


def _branch(options: argparse.Namespace) -> None:
    from clustering.clustering import Clustering
    from xelm.runs.branch import branch
    from xelm.runs.run import open_run

    registry = branch(open_run(options.run), Clustering.load(options.clusters))
    if options.json:
        print_json([_facts(expert) for expert in registry.experts])
        return
    for expert in registry.experts:
        print(f"{expert.name:20}{expert.status:12}{' '.join(expert.languages)}")


BRANCH = Command("record one expert for each cluster", _branch_options, _branch)


def _train_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_settings(
        parser,
        "change a setting for this command, such as experts.runtime.mesh_fsdp=4; may be repeated",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="experts to train")
    parser.add_argument(
        "--all", action="store_true", help="train every expert that is not trained yet"
    )
    parser.add_argument(
        "--dense", action="store_true", help="train the dense baseline at the experts' total tokens"
    )
    add_dry_run(parser)
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="number of experts that are trained at the same time on this machine, each on its "
        "share of the GPUs (default: 1)",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where to train: on this machine (default), or on the machines of the Ray cluster at "
        "RAY_ADDRESS, which must all have access to RUN",
    )
    parser.add_argument(
        "--hosts",
        action="store_true",
        help="join the other processes that train together: those of a TPU pod or a Slurm step, "
        "or those that JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe",
    )
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="number of accelerators for each expert, with --engine ray (default: 1)",
    )
    add_json(parser)


def _train(options: argparse.Namespace) -> None:
    from xelm import tables
    from xelm.config import check_resumable
    from xelm.runs.budget import check_disk
    from xelm.runs.launch import launch
    from xelm.runs.run import open_run
    from xelm.runs.status import progress
    from xelm.runs.train import plans_of
    from xelm.training.hosts import ending_alone, is_first

    _check_places(options)
    if options.hosts:
        from xelm.training.hosts import join

        join()
    check_resumable(options.settings, "experts")
    run = open_run(options.run, settings=options.settings)
    names = _names_to_train(run, options)
    if options.dry_run:
        together = max(options.jobs, run.config.experts.runtime.mesh_expert)
        plans = plans_of(run, names, dense=options.dense)
        _print_plans(options, plans)
        check_disk(run.directory, plans, together=together)
        return
    with ending_alone() if options.hosts else nullcontext():
        failures = launch(
            run,
            names,
            dense=options.dense,
            jobs=options.jobs,
            engine=options.engine,
            devices=options.devices or 1,
        )
    if not options.hosts or is_first():
        found = progress(run)
        if options.json:
            print_json([dataclasses.asdict(each) for each in found])
        else:
            print(tables.status(found))
    if failures:
        raise UserError("; ".join(dict.fromkeys(failures.values())))


def _check_places(options: argparse.Namespace) -> None:
    """Raises UserError for options of places to train that exclude each other."""
    for option, least in (("jobs", 1), ("devices", 1)):
        given = getattr(options, option)
        if given is not None and given < least:
            raise UserError(f"--{option} must be at least {least}; got {given}")
    if options.devices and options.engine != "ray":
        raise UserError("--devices goes with --engine ray")
    if options.hosts and (options.jobs > 1 or options.engine == "ray"):
        raise UserError("--hosts goes with neither --jobs nor --engine ray")
    if options.jobs > 1 and options.engine == "ray":
        raise UserError("--jobs goes with --engine local; Ray runs as many as it has devices for")


def _names_to_train(run: "Run", options: argparse.Namespace) -> list[str]:
    """Returns the experts that the options name. Raises UserError if there are none, and for an
    expert that `xelm grow` trains."""
    names = list(dict.fromkeys(options.names))
    if options.all:
        run.clusters()  # raises UserError if the RUN has no experts yet
        names += [e.name for e in run.registry().training() if e.cluster and e.name not in names]
    if not names and not options.dense and not options.all:
        raise UserError("name the experts to train, or give --all or --dense")
    for name in names:
        expert = run.registry().expert(name)
        if expert.status == "training" and expert.cluster is None:
            (tag,) = expert.languages
            command = f"xelm grow {options.run} --language {tag}"
            raise UserError(f"{name} is a grown expert; resume its training with: {command}")
    return names


TRAIN = Command(
    "train experts or the dense baseline; resume where it was interrupted", _train_options, _train
)


def _grow_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_settings(
        parser,
        "change a setting for this command, such as grow.tokens=3e6; may be repeated",
    )
    parser.add_argument(
        "--language",
        required=True,
        metavar="XX",
        help="language of the new expert, as a code such as sv",
    )
    add_corpus(parser, "text that includes the language (default: the RUN's corpus)")
    parser.add_argument(
        "--parent",
        default="auto",
        metavar="NAME",
        help="expert to start from (default: that of the nearest language)",
    )
    parser.add_argument(
        "--by",
        metavar="MEASURE",
        help="measure by which the nearest language is found, as in xelm nearest (default: "
        "mixture); not with --parent",
    )
    add_dry_run(parser)
    add_workers(parser)
    add_json(parser)


def _grow(options: argparse.Namespace) -> None:
    from xelm import tables
    from xelm.config import check_resumable
    from xelm.data.text_stats import text_stats
    from xelm.runs.grow import grow, plan_growth
    from xelm.runs.run import open_run

    check_resumable(options.settings, "grow")
    run = open_run(options.run, settings=options.settings)
    if options.dry_run:
        expert, plan, text = plan_growth(
            run,
            options.language,
            corpus_of(options),
            parent=options.parent,
            by=options.by,
            workers=options.workers,
        )
        last = f"{expert.reference} would start from {expert.parent}; nothing was changed"
        _print_plans(options, [plan], [text], last)
        return
    expert = grow(
        run,
        options.language,
        corpus_of(options),
        parent=options.parent,
        by=options.by,
        workers=options.workers,
    )
    (tag,) = expert.languages
    print(tables.texts([text_stats(run.store(tag))[tag]]), file=sys.stderr)
    if options.json:
        print_json(_facts(expert))
        return
    print(
        f"{expert.reference} from {expert.parent}, round {expert.round}, {expert.tokens:,} tokens"
    )


def _facts(expert: "Expert") -> dict[str, Any]:
    """Returns the record of an expert for --json, without its hashes."""
    record = expert.to_json()
    return {key: value for key, value in record.items() if key != "sha256"}


GROW = Command("add an expert for a new language; no other expert changes", _grow_options, _grow)
