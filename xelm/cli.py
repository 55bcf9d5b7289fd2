"""The command line: parse, load, call one function, write. Results go to stdout, progress to
stderr."""

import argparse
import ctypes
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clustering.errors import UserError
from xelm import __version__
from xelm.presets import PRESETS

ROUTINGS = ("language", "tfidf", "uniform", "posterior")
METHODS = ("typology", "tfidf", "random")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 for a user's mistake, 130 if interrupted."""
    try:
        options = _parsed(sys.argv[1:] if arguments is None else arguments)
        prepare()
        options.run_command(options)
    except KeyboardInterrupt:
        print("xelm: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, which is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        line = _mistake(error)
        if line is None:
            raise
        print(f"xelm: {line}", file=sys.stderr)
        return 2
    return 0


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"an argument is not UTF-8: {argument!r}") from None
    top = parser()
    options, rest = top.parse_known_args(arguments)
    # Names that come after a flag, which argparse does not take for those of `names`.
    if rest and ("names" not in options or any(name.startswith("-") for name in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.names += rest
    return options


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    top = argparse.ArgumentParser(
        prog="xelm",
        description="Cross-lingual expert language models: cluster languages, train an "
        "expert for each cluster, grow new ones, ask them together.",
    )
    top.add_argument("--version", action="version", version=f"xelm {__version__}")
    verbs = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (summary, add_options, run_command) in VERBS.items():
        verb = verbs.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        add_options(verb)
        verb.set_defaults(run_command=run_command)
    return top


def _quickstart_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--out",
        metavar="RUN",
        default="xelm-quickstart",
        help="directory to make (default: %(default)s)",
    )


def _quickstart(options: argparse.Namespace) -> None:
    from xelm import tables
    from xelm.quickstart import NEW_LANGUAGES, quickstart

    run, rows, page = quickstart(options.out)
    print(tables.results(rows, ("language", "tfidf", "posterior"), run.languages))
    print(f"\nReport: {page}\n\nNext:")
    print(f'  xelm generate {run.directory} "Der alte Mann" --routing language --language de')
    print(f"  xelm grow {run.directory} --language {NEW_LANGUAGES[1]}")
    print("  xelm init MY_RUN --corpus MY_CORPUS --preset tiny")


def _cluster_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--method",
        choices=METHODS,
        default="typology",
        help="typology and random cluster languages, tfidf documents",
    )
    verb.add_argument("-k", type=int, required=True, help="number of clusters")
    verb.add_argument(
        "--languages",
        type=_list,
        metavar="A,B,C",
        help="languages to cluster (default: those of --run or --corpus)",
    )
    verb.add_argument(
        "--exclude", type=_list, metavar="A,B", default=(), help="languages to leave in no cluster"
    )
    verb.add_argument("--run", metavar="RUN", help="RUN whose corpus and subwords tfidf uses")
    verb.add_argument("--corpus", metavar="DIR", help="take the languages of this corpus")
    verb.add_argument(
        "--free", action="store_true", help="let cluster sizes fall as they may (typology)"
    )
    verb.add_argument("--random-seed", type=int, default=0, metavar="N")
    verb.add_argument(
        "--out", metavar="DIR", required=True, help="directory for clusters.json and figures"
    )
    _json(verb)


def _cluster(options: argparse.Namespace) -> None:
    from clustering import control, tfidf, typology
    from xelm.runs.run import open_run

    if (Path(options.out) / "clusters.json").exists():
        raise UserError(f"{options.out}/clusters.json exists already; choose another folder")
    run = open_run(options.run) if options.run else None
    for name, given in {"--exclude": options.exclude, "--free": options.free}.items():
        if given and options.method != "typology":
            raise UserError(f"{name} goes with --method typology")
    languages = options.languages
    if languages is None and options.corpus:
        from xelm.data.corpus import languages_of

        languages = languages_of(options.corpus)
    if languages is None and run:
        languages = run.languages
    if options.method == "tfidf":
        if run is None:
            raise UserError("tfidf clusters the documents of a RUN; name it with --run")
        from xelm.runs.training import documents_with_languages

        documents, tags = documents_with_languages(run, languages)
        clustering = tfidf.cluster(
            documents,
            tags,
            run.vectoriser(),
            options.k,
            options.random_seed,
            made_from={"corpus": run.store().record["corpus_sha256"]},
        )
    elif languages is None:
        raise UserError("name the languages with --languages, --corpus or --run")
    elif options.method == "random":
        clustering = control.random_clusters(languages, options.k, options.random_seed)
    else:
        clustering = typology.cluster(
            languages, options.k, balanced=not options.free, exclude=options.exclude
        )
    clustering.save(options.out)
    _draw(clustering, Path(options.out))
    if options.json:
        _print_json({"clusters": clustering.clusters, "unassigned": clustering.unassigned})
    else:
        print(clustering)
        print(f"\nSaved in {options.out}")


def _draw(clustering: Any, directory: Path) -> None:
    if clustering.of_documents:
        plots = {"composition": clustering.plot_composition}
    elif clustering.distances is None:
        plots = {}
    else:
        plots = {"tree": clustering.plot_tree, "distances": clustering.plot_distances}
    for name, plot in plots.items():
        plot().figure.savefig(directory / f"{name}.png", dpi=150, bbox_inches="tight")


def _init_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", metavar="RUN")
    verb.add_argument(
        "--corpus",
        required=True,
        metavar="DIR",
        help="folder of <language>.jsonl[.gz|.zst] or .parquet, or such a file, or "
        "hf://owner/dataset[/config][:split]",
    )
    verb.add_argument("--seed", metavar="HF_DIR", help="start from this Hugging Face checkpoint")
    verb.add_argument(
        "--preset", choices=PRESETS, help="configuration (default: tiny, or hub with --seed)"
    )
    verb.add_argument(
        "--languages",
        type=_list,
        metavar="A,B,C",
        help="languages of the corpus to use (default: all)",
    )
    verb.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change the configuration, as in experts.tokens=3e6; may be repeated",
    )
    verb.add_argument("--clusters", metavar="DIR", help="branch on these clusters at once")


def _init(options: argparse.Namespace) -> None:
    from clustering.clustering import Clustering
    from xelm.config import override
    from xelm.runs.init import init

    shapes = [s for s in options.settings if s.startswith("model") and options.seed]
    if shapes:
        raise UserError(f"{shapes[0]} is of a model that is made here; --seed has its own shape")
    preset = options.preset or ("hub" if options.seed else "tiny")
    config = override(PRESETS[preset](), options.settings)
    run = init(
        options.run,
        options.corpus,
        config,
        seed=options.seed,
        languages=options.languages,
        clusters=Clustering.load(options.clusters) if options.clusters else None,
    )
    counts = run.store().record["languages"]
    print(f"{'language':10}{'documents':>12}{'tokens':>14}{'bytes':>14}")
    for tag, count in counts.items():
        print(f"{tag:10}{count['documents']:>12,}{count['tokens']:>14,}{count['bytes']:>14,}")
    print(f"\nRUN: {run.directory}")


def _branch_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", metavar="RUN")
    verb.add_argument("--clusters", required=True, metavar="DIR")


def _branch(options: argparse.Namespace) -> None:
    from clustering.clustering import Clustering
    from xelm.runs.run import open_run
    from xelm.runs.training import branch

    registry = branch(open_run(options.run), Clustering.load(options.clusters))
    for expert in registry.experts:
        print(f"{expert.name:20}{expert.status:12}{' '.join(expert.languages)}")


def _train_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", metavar="RUN")
    verb.add_argument("names", nargs="*", metavar="NAME", help="experts to train")
    verb.add_argument("--all", action="store_true", help="train every expert not trained yet")
    verb.add_argument(
        "--dense", action="store_true", help="train the dense baseline at the experts' total tokens"
    )


def _train(options: argparse.Namespace) -> None:
    from xelm.runs.run import open_run
    from xelm.runs.training import train_dense, train_experts

    run = open_run(options.run)
    names = list(options.names)
    if options.all:
        run.clusters()  # which an expert of --all needs
        names += [e.name for e in run.registry().training() if e.cluster and e.name not in names]
    if not names and not options.dense and not options.all:
        raise UserError("name the experts to train, or give --all or --dense")
    for name in names:
        expert = run.registry().expert(name)
        if expert.status == "training" and expert.cluster is None:
            (tag,) = expert.languages
            raise UserError(
                f"{name} is grown; go on with: xelm grow {options.run} --language {tag}"
            )
    if options.dense:
        train_dense(run)
        print(f"dense{'':15}trained     {run.dense}")
    train_experts(run, names)
    for expert in run.registry().published():
        print(f"{expert.name:20}{expert.status:12}v{expert.version}  {expert.tokens:,} tokens")


def _grow_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", metavar="RUN")
    verb.add_argument("--language", required=True, metavar="XX")
    verb.add_argument(
        "--corpus", metavar="DIR", help="has text in the language (default: the RUN's corpus)"
    )
    verb.add_argument(
        "--parent",
        default="auto",
        metavar="NAME",
        help="expert to start from (default: that of the nearest language)",
    )


def _grow(options: argparse.Namespace) -> None:
    from xelm.runs.growing import grow
    from xelm.runs.run import open_run

    run = open_run(options.run)
    expert = grow(run, options.language, options.corpus, parent=options.parent)
    print(
        f"{expert.reference} from {expert.parent}, round {expert.round}, {expert.tokens:,} tokens"
    )


def _evaluate_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", metavar="RUN")
    verb.add_argument("--corpus", required=True, metavar="DIR")
    verb.add_argument(
        "--routing",
        type=_list,
        default=ROUTINGS,
        metavar="A,B",
        help=f"of {', '.join(ROUTINGS)} (default: all); by language alone is the quickest",
    )
    verb.add_argument("--max-documents", type=int, metavar="N", help="of each language")
    _router(verb)
    _json(verb)


def _evaluate(options: argparse.Namespace) -> None:
    from xelm import tables
    from xelm.runs.evaluation import FILE_NAME, evaluate
    from xelm.runs.run import open_run

    run = open_run(options.run)
    rows = evaluate(
        run,
        options.corpus,
        routings=options.routing,
        top_m=options.top_m,
        temperature=options.router_temperature,
        max_documents=options.max_documents,
    )
    if options.json:
        _print_json([row.to_json() for row in rows])
    else:
        print(tables.results(rows, options.routing, run.languages))
        print(f"\nSaved in {run.results / FILE_NAME}")


def _generate_options(verb: argparse.ArgumentParser) -> None:
    default = "what the seed asks for"
    verb.add_argument("run", metavar="RUN")
    verb.add_argument("prompt")
    _routing(verb, "prompt")
    verb.add_argument("--chat", action="store_true", help="the prompt is a turn of a chat")
    verb.add_argument("--max-new-tokens", type=int, metavar="N", help=f"(default: {default})")
    verb.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help=f"0 takes the most probable token (default: {default})",
    )
    verb.add_argument("--top-k", type=int, metavar="K", help=f"(default: {default})")
    verb.add_argument("--top-p", type=float, metavar="P", help=f"(default: {default})")
    verb.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    verb.add_argument("--random-seed", type=int, default=0, metavar="N")
    _router(verb)
    _json(verb)


def _generate(options: argparse.Namespace) -> None:
    from xelm.runs.run import open_run

    ensemble = open_run(options.run).ensemble(
        _chosen_routing(options), top_m=options.top_m, temperature=options.router_temperature
    )
    prompt = [{"role": "user", "content": options.prompt}] if options.chat else options.prompt

    # With its first piece, so that nothing is shown of a prompt that is refused.
    before = [] if options.chat else [options.prompt]

    def show(piece: str) -> None:
        print(*before, piece, sep="", end="", flush=True)
        before.clear()

    generation = ensemble.generate(
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=options.stop,
        random_seed=options.random_seed,
        language=options.language,
        stream=(lambda piece: None) if options.json else show,
    )
    if options.json:
        _print_json({"text": generation.text, "weights": generation.weights})
        return
    print()
    _print_weights(generation.weights)


def _fill_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", metavar="RUN")
    verb.add_argument("text", help="with the mask of the seed's tokenizer, such as [MASK]")
    _routing(verb, "text")
    verb.add_argument("--count", type=int, default=5, metavar="N", help="guesses for each mask")
    _router(verb)
    _json(verb)


def _fill(options: argparse.Namespace) -> None:
    from xelm.runs.run import open_run

    ensemble = open_run(options.run).ensemble(
        _chosen_routing(options), top_m=options.top_m, temperature=options.router_temperature
    )
    filling = ensemble.fill(options.text, count=options.count, language=options.language)
    if options.json:
        masks = [[guess._asdict() for guess in guesses] for guesses in filling.masks]
        _print_json({"masks": masks, "weights": filling.weights})
        return
    for number, guesses in enumerate(filling.masks, 1):
        print(f"mask {number}")
        for guess in guesses:
            print(f"  {guess.probability:<9.3g} {json.dumps(guess.text, ensure_ascii=False)}")
    _print_weights(filling.weights)


def _report_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", metavar="RUN")


def _report(options: argparse.Namespace) -> None:
    from xelm.runs.report import report
    from xelm.runs.run import open_run

    print(report(open_run(options.run)))


def _verify_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", metavar="RUN")
    _json(verb)


def _verify(options: argparse.Namespace) -> None:
    from experts.verify import verify
    from xelm.runs.run import open_run

    faults = verify(open_run(options.run).directory)
    if options.json:
        _print_json([str(fault) for fault in faults])
    if faults:
        first = "; ".join(map(str, faults[:5]))
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise UserError(f"{options.run} is damaged: {first}{more}")
    if not options.json:
        print(f"{options.run}: every file of the seed and of every expert is as published")


def _rollback_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", metavar="RUN")
    verb.add_argument("name", metavar="NAME")
    verb.add_argument("--version", type=int, metavar="N", help="default: the one before")


def _rollback(options: argparse.Namespace) -> None:
    from experts.lock import update
    from experts.rollback import rollback
    from xelm.runs.run import open_run

    run = open_run(options.run)
    registry = update(run.directory, lambda r: rollback(r, options.name, options.version))
    print(f"published: {registry.expert(options.name).reference}")


def _merge_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", metavar="RUN")
    verb.add_argument("names", nargs="*", metavar="NAME", help="default: all published experts")
    verb.add_argument("--out", required=True, metavar="DIR")


def _merge(options: argparse.Namespace) -> None:
    from experts.merge import average
    from xelm.runs.run import open_run

    run = open_run(options.run)
    registry = run.registry()
    experts = [registry.expert(name) for name in options.names] or registry.published()
    if not experts:
        raise UserError(f"{options.run} has no published expert yet; train some first")
    print(average([expert.directory(run.directory) for expert in experts], out=options.out))


def _router(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--top-m", type=int, metavar="M", help="experts asked at each token")
    verb.add_argument(
        "--router-temperature",
        type=float,
        metavar="X",
        help="of TF-IDF routing; small trusts the nearest expert alone",
    )


def _routing(verb: argparse.ArgumentParser, text: str) -> None:
    verb.add_argument(
        "--routing",
        choices=ROUTINGS,
        help="who speaks (default: tfidf, or language where --language is given)",
    )
    verb.add_argument("--language", metavar="XX", help=f"of the {text}, for --routing language")


def _chosen_routing(options: argparse.Namespace) -> str:
    routing = options.routing or ("tfidf" if options.language is None else "language")
    if options.language is not None and routing != "language":
        raise UserError("--language goes with --routing language")
    return routing


def _print_weights(weights: Mapping[str, float]) -> None:
    ordered = sorted(weights.items(), key=lambda item: -item[1])
    spoken = [f"{name} {weight:.2f}" for name, weight in ordered if weight >= 0.005]
    print(f"experts: {', '.join(spoken)}", file=sys.stderr)


def _json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print JSON")


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


def _mistake(error: Exception) -> str | None:
    """What a user can do about an error, in a line; None for an error of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, ModuleNotFoundError) and error.name == "tensorboardX":
        return "tensorboard=true needs tensorboardX; pip install 'xelm[tensorboard]'"
    # JAX, which is not imported here, raises its own kind of RuntimeError.
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return (
            "the memory of the device is used up; lower batch_size, raise accumulation_steps "
            "or set rematerialise=true"
        )
    return None


def prepare() -> None:
    """What a program may set and a library may not: quiet helpers, a cache of compiled code, how
    memory is held."""
    import absl.logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Orbax logs what fails in its threads, with tracebacks, before it is raised and told in a line.
    absl.logging.set_verbosity(absl.logging.FATAL)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xelm" / "compiled"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Has the C library keep what is freed for what comes next, unless the user has given it
    settings of his own. XLA on CPUs asks for the same memory at every step, and a third of the time
    goes into getting it from the system afresh (benchmarks/freed_memory.py). The process then stays
    as large as it once was."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    library = ctypes.CDLL(None)
    # malloc.h: M_ARENA_MAX (one heap for all threads), M_MMAP_MAX (nothing beside it) and
    # M_TRIM_THRESHOLD (nothing at its end is given back).
    for option, value in ((-8, 1), (-4, 0), (-1, -1)):
        library.mallopt(option, value)


# Verb -> what it does, its options, its code; in the order of the help.
VERBS = {
    "quickstart": (
        "the whole path on the embedded sample corpus, on a CPU, in minutes",
        _quickstart_options,
        _quickstart,
    ),
    "cluster": ("cluster languages or documents", _cluster_options, _cluster),
    "init": ("make a RUN: tokenizer, tokenised corpus and seed", _init_options, _init),
    "branch": ("record one expert for each cluster", _branch_options, _branch),
    "train": ("train experts, or the dense baseline; resumes by itself", _train_options, _train),
    "grow": ("add an expert for a new language; touch nothing else", _grow_options, _grow),
    "evaluate": ("perplexity and bits per byte by language", _evaluate_options, _evaluate),
    "generate": ("continue a prompt with the ensemble", _generate_options, _generate),
    "fill": ("guess the masked tokens of a text (encoders)", _fill_options, _fill),
    "report": ("write one self-contained HTML page about a RUN", _report_options, _report),
    "verify": ("check every hash of seed and experts", _verify_options, _verify),
    "rollback": ("publish an earlier version of an expert again", _rollback_options, _rollback),
    "merge": ("average the weights of experts into one checkpoint", _merge_options, _merge),
}


if __name__ == "__main__":
    sys.exit(main())
