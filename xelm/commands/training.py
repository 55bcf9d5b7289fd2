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
    add_budget,
    add_corpus,
    add_dry_run,
    add_fields,
    add_settings,
    add_workers,
    corpus_of,
    given_fields,
    names,
    run_of,
    show,
    workers_of,
)
from xelm.presets import PRESETS
from xelm.runs.options import INITIALISE, AgainOptions, GrowOptions, InitOptions, LaunchOptions

if TYPE_CHECKING:
    from experts.expert import Expert
    from xelm.data.text_stats import TextStats
    from xelm.runs.budget import Plan
    from xelm.runs.run import Run

# Settings that have no effect where the seed is a given checkpoint.
_OF_FRESH_SEEDS = ("model", "seed.", "tokenizer_")


def _quickstart_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        metavar="RUN",
        default="xelm-quickstart",
        help="directory to make (default: %(default)s)",
    )


def _quickstart(options: argparse.Namespace) -> None:
    from xelm import tables
    from xelm.quickstart import NEW_LANGUAGES, quickstart

    run, results, page = quickstart(options.out)
    table = tables.results(results, ("language", "learned", "tfidf"), run.languages)
    show(
        options,
        {"run": str(run.directory), "report": str(page), "results": results.record},
        f"{table}\n\nReport: {page}\n\nNext:\n"
        f'  xelm generate {run.directory} "Der alte Mann" --routing language --language de\n'
        f"  xelm grow {run.directory} --language {NEW_LANGUAGES[1]}\n"
        "  xelm init MY_RUN --corpus MY_CORPUS --preset tiny",
    )


QUICKSTART = Command(
    "run every step on the embedded sample corpus, on a CPU, in minutes",
    _quickstart,
    _quickstart_options,
    on_run=False,
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
        "--preset",
        choices=PRESETS,
        help="configuration to start from (default: tiny, or hub with --seed); xelm config shows "
        "it",
    )
    add_settings(
        parser, "change a setting of the configuration, such as experts.tokens=3e6; may be repeated"
    )
    parser.add_argument(
        "--clusters",
        metavar="DIR",
        help="record one expert for each of these clusters at once, as xelm branch does",
    )
    add_dry_run(parser)
    add_workers(parser)
    fields = ("seed", "base_model", "languages", "keep_duplicates")
    add_fields(parser, InitOptions, *fields, title="seed and text")


def _init(options: argparse.Namespace) -> None:
    from clustering.clustering import Clustering
    from xelm import api, tables
    from xelm.data.text_stats import text_stats
    from xelm.runs.init import plan_init
    from xelm.settings import override

    given = InitOptions(**given_fields(options, InitOptions), workers=workers_of(options))
    unused = [s for s in options.settings if given.seed and s.startswith(_OF_FRESH_SEEDS)]
    if unused:
        raise UserError(
            f"{unused[0]} has no effect on a given seed: the checkpoint of --seed is used as it is"
        )
    preset = options.preset or ("hub" if given.seed else "tiny")
    config = override(PRESETS[preset](), options.settings)
    corpus = corpus_of(options)
    assert corpus is not None  # the option is required
    clusters = Clustering.load(options.clusters) if options.clusters else None
    if options.dry_run:
        plans, texts = plan_init(options.run, corpus, config, given, clusters=clusters)
        print_plans(options, plans, texts, f"Nothing was written to {options.run}")
        return
    run = api.init(options.run, corpus, config, given, clusters=clusters)
    store = run.store()
    table = tables.texts(list(text_stats(store).values()))
    facts = {"run": str(run.directory), "languages": store.record["languages"]}
    show(options, facts, f"{table}\n\nRUN: {run.directory}")


def print_plans(
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
    table = budget.table(plans) if plans else "no training is left to do"
    parts = [tables.texts(texts) if texts else "", table, last]
    trainings = [dataclasses.asdict(plan) for plan in plans]
    facts = {"trainings": trainings, "texts": [text.to_json() for text in texts]}
    show(options, facts, "\n\n".join(part for part in parts if part))


INIT = Command(
    "make a RUN: tokenizer, tokenised corpus and seed model", _init, _init_options, on_run=False
)


def _branch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clusters", required=True, metavar="DIR", help="directory that xelm cluster wrote"
    )


def _branch(options: argparse.Namespace) -> None:
    experts = run_of(options).branch(options.clusters).experts
    lines = [f"{each.name:20}{each.status:12}{' '.join(each.languages)}" for each in experts]
    show(options, [_facts(expert) for expert in experts], "\n".join(lines))


BRANCH = Command("record one expert for each cluster", _branch, _branch_options)


def _train_options(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument(
        "--rounds",
        type=_counts,
        metavar="K,K,...",
        help="train all experts in rounds: those of fewer, larger clusters first, from which those "
        "of the next round start. Numbers of clusters, such as 1,4,8; the last is that of the RUN",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="train the next version of the published expert NAME; the version in use is then "
        "retired",
    )
    parser.add_argument(
        "--from",
        dest="start",
        metavar="MODEL",
        help="model that the next version starts from: seed, parent, or NAME@vN (default: the "
        "version in use)",
    )
    add_corpus(parser, "text that the next version is trained on too")
    add_budget(parser)
    add_workers(parser)
    add_dry_run(parser)
    parser.add_argument(
        "--hosts",
        action="store_true",
        help="join the other processes that train together: those of a TPU pod or a Slurm step, "
        "or those that JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe",
    )
    add_fields(parser, LaunchOptions, title="places to train")


def _train(options: argparse.Namespace) -> None:
    from xelm import tables
    from xelm.config import check_changeable
    from xelm.runs.budget import check_disk
    from xelm.runs.fitted import fit_published
    from xelm.runs.launch import launch
    from xelm.runs.rounds import train_rounds
    from xelm.training.hosts import ending_alone, is_first, join

    where = LaunchOptions(**given_fields(options, LaunchOptions))
    if options.again:
        _train_again(options, where)
        return
    for name in ("start", "corpus", "tokens", "passes", "workers"):
        if getattr(options, name) is not None:
            raise UserError(f"--{'from' if name == 'start' else name} goes with --again")
    corpus_of(options)  # which refuses the options that go with --corpus
    if options.rounds and (options.names or options.all or options.hosts):
        raise UserError(
            "--rounds trains all experts; it goes with neither names, --all nor --hosts"
        )
    if options.hosts:
        if where.jobs > 1 or where.engine == "ray":
            raise UserError("--hosts goes with neither --jobs nor --engine ray")
        join()
    check_changeable(options.settings, "experts")
    run = run_of(options)
    names = [] if options.rounds else _names_to_train(run, options)
    if options.dry_run:
        together = max(where.jobs, run.config.experts.runtime.mesh_expert)
        if options.rounds:
            plans = run.plan_rounds(options.rounds, dense=options.dense)
        else:
            plans = run.plan_training(*names, dense=options.dense)
        print_plans(options, plans)
        check_disk(run.directory, plans, together=together)
        return
    with ending_alone() if options.hosts else nullcontext():
        if options.rounds:
            failures = train_rounds(run, options.rounds, where, dense=options.dense)
        else:
            failures = launch(run, names, where, dense=options.dense)
    if not options.hosts or is_first():
        found = run.status()
        show(options, [dataclasses.asdict(each) for each in found], tables.status(found))
    if failures:
        raise UserError("; ".join(dict.fromkeys(failures.values())))
    fit_published(run)


def _counts(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"numbers of clusters such as 1,4,8 wanted; got {text!r}")
    return tuple(map(int, parts))


def _train_again(options: argparse.Namespace, where: LaunchOptions) -> None:
    from xelm.config import check_changeable

    others = options.all or options.dense or options.hosts or options.rounds
    if len(options.names) != 1 or others:
        raise UserError("--again trains the next version of one expert; name it alone")
    if where != LaunchOptions():
        raise UserError("--again trains in this process; it goes with neither --jobs nor --engine")
    (name,) = options.names
    known = run_of(argparse.Namespace(run=options.run)).registry().expert(name)
    part = "grow" if known.cluster is None else "experts"
    _add_budget(options, part)
    check_changeable(options.settings, part, begins=True)
    run, corpus = run_of(options), corpus_of(options)
    if corpus is None and options.workers is not None:
        raise UserError("--workers goes with --corpus: without more text, nothing is tokenised")
    given = AgainOptions(start=options.start, workers=workers_of(options))
    if options.dry_run:
        expert, plan, texts = run.plan_again(name, corpus, given)
        last = f"{expert.reference} would start from {expert.parent}; nothing was changed"
        print_plans(options, [plan], texts, last)
        return
    expert = run.train_again(name, corpus, given)
    origin = f"from {expert.parent}, {expert.tokens:,} tokens"
    show(options, _facts(expert), f"{expert.reference} {origin}")


def _add_budget(options: argparse.Namespace, part: str) -> None:
    """Adds the settings that `--tokens` or `--passes` stands for."""
    for name in ("tokens", "passes"):
        if (value := getattr(options, name)) is not None:
            options.settings.append(f"{part}.{name}={value}")


def _names_to_train(run: "Run", options: argparse.Namespace) -> list[str]:
    """Returns the experts that the options name; UserError if there are none."""
    names = list(dict.fromkeys(options.names))
    if options.all:
        run.clusters()  # raises UserError if the RUN has no experts yet
        names += [name for name in run.untrained() if name not in names]
    if not names and not options.dense and not options.all:
        raise UserError("name the experts to train, or give --all or --dense")
    return names


TRAIN = Command(
    "train experts or the dense baseline; resume where it was interrupted", _train, _train_options
)


def _grow_options(parser: argparse.ArgumentParser) -> None:
    add_settings(
        parser, "change a setting for this command, such as grow.tokens=3e6; may be repeated"
    )
    parser.add_argument(
        "--language",
        dest="languages",
        type=names,
        action="extend",
        default=[],
        metavar="XX,...",
        help="language of the new expert, as a code such as sv, or several, which form clusters "
        "with an expert each",
    )
    add_corpus(parser, "text that includes the language (default: the RUN's corpus)")
    add_budget(parser)
    add_dry_run(parser)
    add_workers(parser)
    add_fields(parser, GrowOptions, "family", "clusters", "into", title="several languages")
    add_fields(parser, GrowOptions, "parent", "by", title="parent")
    add_fields(
        parser,
        GrowOptions,
        *("extend_vocabulary", "initialise"),
        title="vocabulary",
        choices={"initialise": INITIALISE},
    )


def _grow(options: argparse.Namespace) -> None:
    from xelm import tables
    from xelm.config import check_changeable
    from xelm.data.text_stats import text_stats

    _add_budget(options, "grow")
    check_changeable(options.settings, "grow", begins=True)
    run, corpus = run_of(options), corpus_of(options)
    given = GrowOptions(**given_fields(options, GrowOptions), workers=workers_of(options))
    if options.dry_run:
        found = run.plan_growth(options.languages, corpus, given)
        lines = [f"{each.reference} would start from {each.parent}" for each in found.experts]
        last = f"{'; '.join(lines)}; nothing was changed"
        print_plans(options, found.plans, found.texts, last)
        return
    experts = run.grow(options.languages, corpus, given)
    texts = [text for each in experts for text in text_stats(run.store(each.texts[-1])).values()]
    print(tables.texts(texts), file=sys.stderr)
    lines = []
    for each in experts:
        which = f" ({' '.join(each.languages)})" if len(each.languages) > 1 else ""
        origin = f"from {each.parent}, round {each.round}, {each.tokens:,} tokens"
        lines.append(f"{each.reference}{which} {origin}")
    facts = [_facts(expert) for expert in experts]
    several = given.family is not None or len(options.languages) > 1
    show(options, facts if several else facts[0], "\n".join(lines))


def _facts(expert: "Expert") -> dict[str, Any]:
    """Returns the record of an expert for --json, without its hashes."""
    return {key: value for key, value in expert.to_json().items() if key != "sha256"}


GROW = Command("add experts for new languages; no other expert changes", _grow, _grow_options)
