"""The commands that make clusters of languages or documents, and rename them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clustering.engines import ENGINES, Engine
from clustering.errors import UserError
from experts.expert import check_name
from xelm.commands.options import (
    Command,
    add_json,
    corpus_of,
    names,
    print_json,
)
from xelm.commands.sources import MEASURES, add_sources, check_sources, measures_named, sources_of

if TYPE_CHECKING:
    from clustering.clustering import Clustering
    from clustering.distances import Distances
    from xelm.runs.distances import Sources
    from xelm.runs.run import Run

RULES = ("pairs", "single", "average", "complete", "balanced")
# Number of resamplings of the features by which a number of clusters is assessed.
RESAMPLINGS = 100


def _cluster_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        default="typology",
        metavar="METHOD",
        help="how to cluster. Languages by a measure: %(default)s (default), "
        f"{', '.join(name for name in MEASURES if name != 'typology')}, or a mixture such as "
        "typology:.7+genealogy:.3. Documents: tfidf, over subwords of --run or characters of "
        "--corpus. Or random, or by-hand",
    )
    parser.add_argument("-k", type=_number, metavar="K", help="number of clusters; auto chooses it")
    parser.add_argument(
        "--languages",
        type=names,
        metavar="A,B,C",
        help="languages to cluster (default: those of --table, --tagged, --corpus or --run)",
    )
    parser.add_argument(
        "--exclude", type=names, metavar="A,B", default=(), help="languages to leave in no cluster"
    )
    parser.add_argument(
        "--rule",
        choices=RULES,
        help="how languages are grouped: pairs (default) and balanced make clusters of equal size; "
        "single, average and complete linkage make clusters of any size",
    )
    parser.add_argument(
        "--balance",
        choices=("languages", "tokens"),
        help="what --rule balanced divides evenly (default: languages); tokens are those of --run",
    )
    add_sources(parser)
    parser.add_argument(
        "--groups",
        metavar="FILE",
        help="YAML file of clusters for by-hand, with lines such as a: [en, de]",
    )
    parser.add_argument(
        "--random-seed",
        type=int,
        metavar="N",
        help="random seed of the methods random and tfidf (default: 0)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="where the documents of tfidf are read: local, on this machine (default), or ray, on "
        "a Ray cluster",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="directory to write clusters.json and figures to",
    )
    add_json(parser)


def _cluster(options: argparse.Namespace) -> None:
    if not options.out:
        raise UserError("--out is empty; name a directory")
    if (Path(options.out) / "clusters.json").exists():
        raise UserError(f"{options.out}/clusters.json exists already; choose another folder")
    _check_options(options)
    makers = {"tfidf": _by_tfidf, "random": _at_random, "by-hand": _by_hand}
    clustering = makers.get(options.method, _by_measure)(options, sources_of(options))
    # The expert of a cluster has its name.
    for name in clustering.clusters:
        check_name(name)
    wanted = clustering.parameters.get("k", 0)
    if len(clustering.clusters) < wanted:
        print(
            f"{len(clustering.clusters)} clusters instead of {wanted}: no document is nearest to "
            "the other centres",
            file=sys.stderr,
        )
    # The record comes last, so that a command that was killed can be run again.
    _draw(clustering, Path(options.out))
    clustering.save(options.out)
    if options.json:
        facts = {name: getattr(clustering, name) for name in ("method", "parameters")}
        groups = {"clusters": clustering.clusters, "unassigned": clustering.unassigned}
        print_json(facts | groups)
    else:
        print(clustering)
        if "reason" in clustering.parameters:
            print(f"\n{clustering.parameters['reason']}")
        print(f"\nSaved in {options.out}")


CLUSTER = Command("cluster languages or documents", _cluster_options, _cluster)


def _by_tfidf(options: argparse.Namespace, sources: "Sources") -> "Clustering":
    from clustering import tfidf
    from xelm.runs.training import documents_of

    run = sources.run
    if run is None:
        return _by_ngrams(options)
    if options.corpus:
        raise UserError("tfidf clusters the documents of --run or of --corpus, not of both")
    return tfidf.cluster(
        documents_of(run, _chosen(options, run), _engine(options)),
        run.vectoriser(),
        _fixed(options),
        options.random_seed or 0,
        made_from={"corpus": run.store().record["corpus_sha256"]},
    )


def _by_ngrams(options: argparse.Namespace) -> "Clustering":
    from clustering import ngrams
    from clustering.documents import Documents
    from clustering.languages import canonical_all
    from xelm.data import contents, parts, reading, unusable

    text = corpus_of(options)
    if text is None:
        raise UserError("tfidf clusters documents; name a RUN with --run, or text with --corpus")
    k, engine = _fixed(options), _engine(options)
    tags = canonical_all(options.languages) if options.languages else None
    plan, faults = contents.contents_of(text.pinned(), tags), unusable.UnusableRecords()
    plan.check()
    surveys = list(engine(parts.Survey.of, plan.parts))
    for survey in surveys:
        faults.include(survey.faults)
    silent = [tag for tag in tags or () if not any(tag in s.documents for s in surveys)]
    if silent:
        raise parts.no_documents(silent, faults)
    counts = [survey.documents for survey in surveys]
    left_out = [survey.faults.total() for survey in surveys]
    print(reading.reading_table(plan, counts, left_out), file=sys.stderr)
    if faults:
        print(f"{text}: {faults}", file=sys.stderr)
    sizes = [sum(count.values()) for count in counts]
    texts = Documents(plan.parts, engine=engine, sizes=sizes)
    made_from = {"corpus": contents.fingerprint_of(plan.parts, [s.digest for s in surveys])}
    return ngrams.cluster(texts, k, options.random_seed or 0, made_from=made_from)


def _engine(options: argparse.Namespace) -> Engine:
    return ENGINES[options.engine or "local"]


def _at_random(options: argparse.Namespace, sources: "Sources") -> "Clustering":
    from clustering import control

    languages = _chosen(options, sources.run)
    if languages is None:
        raise UserError("random needs languages; name them with --languages, --corpus or --run")
    return control.random_clusters(languages, _fixed(options), options.random_seed or 0)


def _by_hand(options: argparse.Namespace, sources: "Sources") -> "Clustering":
    from clustering import control

    if options.groups is None:
        raise UserError("by-hand needs a YAML file of clusters; name it with --groups")
    return control.read_groups(options.groups)


def _by_measure(options: argparse.Namespace, sources: "Sources") -> "Clustering":
    from dataclasses import replace

    from clustering import choice, grouping
    from clustering.languages import without
    from xelm.runs.distances import languages_of, measured, resampled

    if options.k is None:
        raise UserError("give the number of clusters with -k, or -k auto")
    languages = options.languages or languages_of(options.method, sources)
    tags, unassigned = without(languages, options.exclude)
    distances, unknown = _known(options, measured(options.method, tags, sources))
    tags = distances.languages
    rule = options.rule or RULES[0]
    sizes = _sizes(options, sources.run, tags)
    k, why = options.k, {}
    if k == "auto":
        drawn = resampled(options.method, tags, sources, RESAMPLINGS)
        found = choice.choices(distances, rule=rule, sizes=sizes, resampled=drawn)
        k, why = choice.best(found).k, {"reason": choice.reason(found)}
    clustering = grouping.cluster(
        distances, k, rule=rule, sizes=sizes, unassigned=unassigned + unknown
    )
    return replace(clustering, parameters=clustering.parameters | why)


def _known(
    options: argparse.Namespace, distances: "Distances"
) -> "tuple[Distances, tuple[str, ...]]":
    """Returns the distances of the languages that can be compared, and the other languages, which
    are named on stderr. Raises UserError if fewer than two can be compared."""
    found, unknown = distances.without_gaps()
    if len(found.languages) < min(2, len(distances.languages)):
        distances.complete()
    if unknown:
        print(
            f"{options.method} knows too little of {', '.join(unknown)}, which are in no cluster; "
            "--method mixture has distances for every language",
            file=sys.stderr,
        )
    return found, unknown


def _sizes(
    options: argparse.Namespace, run: "Run | None", tags: Sequence[str]
) -> dict[str, int] | None:
    if options.balance != "tokens":
        return None
    if run is None:
        raise UserError("--balance tokens needs the tokens of a RUN; name it with --run")
    counts = run.store().record["languages"]
    missing = [tag for tag in tags if tag not in counts]
    if missing:
        raise UserError(f"{run.directory} has no text in {', '.join(missing)}")
    return {tag: counts[tag]["tokens"] for tag in tags}


def _check_options(options: argparse.Namespace) -> None:
    """Raises UserError for options that the method does not use."""
    methods = set(measures_named(options.method))
    unknown = methods - {*MEASURES, "tfidf", "random", "by-hand"}
    if unknown:
        raise UserError(
            f"unknown method {min(unknown)!r}; there are {', '.join(MEASURES)}, tfidf, random and "
            "by-hand"
        )
    alone = methods - set(MEASURES)
    if alone and len(methods) > 1:
        raise UserError(f"{min(alone)} cannot be mixed with other methods; got {options.method}")
    wants = {
        "--exclude": (options.exclude, MEASURES),
        "--rule": (options.rule, MEASURES),
        "--groups": (options.groups, ("by-hand",)),
        "--random-seed": (options.random_seed is not None, ("random", "tfidf")),
        "--engine": (options.engine, ("tfidf",)),
    }
    for name, (given, allowed) in wants.items():
        if given and not methods & set(allowed):
            measured = "a measure" if allowed == MEASURES else " or ".join(allowed)
            raise UserError(f"{name} goes with --method {measured}")
    check_sources(options, methods)
    if options.balance and options.rule != "balanced":
        raise UserError("--balance goes with --rule balanced")
    if options.method == "by-hand" and (options.k or options.languages):
        raise UserError(
            "-k and --languages go with other methods; by-hand takes its clusters from --groups"
        )


def _chosen(options: argparse.Namespace, run: "Run | None") -> Sequence[str] | None:
    if options.languages is None and (corpus := corpus_of(options)):
        from xelm.data.contents import languages_of

        return languages_of(corpus)
    return options.languages or (run.languages if run else None)


def _fixed(options: argparse.Namespace) -> int:
    if not isinstance(options.k, int):
        raise UserError(f"--method {options.method} needs a number of clusters, such as -k 8")
    return options.k


def _number(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number wanted, or auto; got {text!r}") from None


def _draw(clustering: "Clustering", directory: Path) -> None:
    """Draws every figure that these clusters have, as PNG and as SVG."""
    from matplotlib import pyplot

    from clustering import uriel

    directory.mkdir(parents=True, exist_ok=True)
    plots = {"sizes": clustering.plot_sizes}
    if clustering.of_documents:
        plots["composition"] = clustering.plot_composition
    elif uriel.known(clustering.languages, "geo"):
        plots["map"] = clustering.plot_map
    if clustering.merges is not None:
        plots["tree"] = clustering.plot_tree
    if clustering.distances is not None:
        plots |= {"distances": clustering.plot_distances, "plane": clustering.plot_plane}
    for name, plot in plots.items():
        figure = plot().figure.get_figure(root=True)
        for ending in ("png", "svg"):
            figure.savefig(directory / f"{name}.{ending}", dpi=150, bbox_inches="tight")
        pyplot.close(figure)


def _rename_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("clusters", metavar="DIR", help="directory that xelm cluster wrote")
    parser.add_argument(
        "names", metavar="OLD=NEW", nargs="+", help="name of a cluster and its new name"
    )
    add_json(parser)


def _rename(options: argparse.Namespace) -> None:
    from clustering.clustering import Clustering

    if (Path(options.clusters) / "run.json").exists():
        raise UserError(
            f"{options.clusters} is a RUN, whose clusters have experts; rename clusters before "
            "xelm branch"
        )
    pairs = [given.partition("=") for given in options.names]
    for old, equals, new in pairs:
        if not equals or not old:
            raise UserError(f"OLD=NEW wanted, such as en-plus7=germanic; got {old}{equals}{new}")
        check_name(new)
    if len({old for old, _, _ in pairs}) < len(pairs):
        raise UserError(f"a cluster is renamed twice: {', '.join(options.names)}")
    clustering = Clustering.load(options.clusters).renamed({old: new for old, _, new in pairs})
    clustering.save(options.clusters, overwrite=True)
    _draw(clustering, Path(options.clusters))
    if options.json:
        print_json({"clusters": clustering.clusters})
    else:
        print(clustering)


RENAME = Command("rename clusters, before xelm branch", _rename_options, _rename)
