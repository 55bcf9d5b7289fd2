"""The commands that make clusters of languages or documents, and rename clusters and experts."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clustering.engines import ENGINES
from clustering.errors import UserError
from experts.expert import check_name
from xelm.commands.options import Command, add_languages, names, show, whole_number
from xelm.commands.sources import add_sources, check_sources, measures_named, sources_of
from xelm.runs.measures import MEASURES

if TYPE_CHECKING:
    from clustering.clustering import Clustering
    from xelm.runs.distances import Sources


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
    add_languages(
        parser, "languages to cluster (default: those of --table, --tagged, --corpus or --run)"
    )
    parser.add_argument(
        "--exclude", type=names, metavar="A,B", default=(), help="languages to leave in no cluster"
    )
    parser.add_argument(
        "--rule",
        metavar="RULE",
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
        type=whole_number,
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


def _cluster(options: argparse.Namespace) -> None:
    from clustering.languages import canonical_all
    from xelm.runs.cluster import save_with_figures

    if not options.out:
        raise UserError("--out is empty; name a directory")
    if (Path(options.out) / "clusters.json").exists():
        raise UserError(f"{options.out}/clusters.json exists already; choose another folder")
    _check_options(options)
    clustering = _clustering(options)
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
    if unknown := sorted(set(clustering.unassigned) - set(canonical_all(options.exclude))):
        print(
            f"{options.method} knows too little of {', '.join(unknown)}, which are in no cluster; "
            "--method mixture has distances for every language",
            file=sys.stderr,
        )
    save_with_figures(clustering, Path(options.out))
    facts = ("method", "parameters", "clusters", "unassigned")
    text = [str(clustering), clustering.parameters.get("reason"), f"Saved in {options.out}"]
    show(
        options,
        {name: getattr(clustering, name) for name in facts},
        "\n\n".join(part for part in text if part),
    )


CLUSTER = Command("cluster languages or documents", _cluster, _cluster_options, on_run=False)


def _clustering(options: argparse.Namespace) -> "Clustering":
    from clustering import control
    from xelm.runs import cluster

    sources, k = sources_of(options), options.k
    if options.method == "by-hand":
        return control.read_groups(options.groups)
    if options.method not in ("tfidf", "random"):
        rule = {"rule": options.rule} if options.rule else {}
        return cluster.by_measure(
            options.method,
            None if k == "auto" else k,
            sources,
            languages=options.languages,
            exclude=options.exclude,
            balance_tokens=options.balance == "tokens",
            **rule,
        )
    seed, languages = options.random_seed or 0, options.languages
    if options.method == "random":
        if languages is None:
            languages = _languages(sources)
        return control.random_clusters(languages, k, seed)
    engine = ENGINES[options.engine or "local"]
    if sources.run is not None:
        return cluster.documents_of_run(sources.run, k, languages, random_seed=seed, engine=engine)
    assert sources.corpus is not None  # as _check_options found
    return cluster.documents_of_corpus(
        sources.corpus, k, languages, random_seed=seed, engine=engine
    )


def _languages(sources: "Sources") -> Sequence[str]:
    from xelm.data.contents import languages_of

    if sources.corpus is not None:
        return languages_of(sources.corpus)
    if sources.run is None:
        raise UserError("random needs languages; name them with --languages, --corpus or --run")
    return sources.run.languages


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
            measured = "a measure" if allowed is MEASURES else " or ".join(allowed)
            raise UserError(f"{name} goes with --method {measured}")
    check_sources(options, methods)
    if options.balance and options.rule != "balanced":
        raise UserError("--balance goes with --rule balanced")
    if options.balance == "tokens" and not options.run:
        raise UserError("--balance tokens needs the tokens of a RUN; name it with --run")
    if options.method == "by-hand":
        if options.groups is None:
            raise UserError("by-hand needs a YAML file of clusters; name it with --groups")
        if options.k or options.languages:
            raise UserError(
                "-k and --languages go with other methods; by-hand takes its clusters from --groups"
            )
    elif options.k is None and not alone:
        raise UserError("give the number of clusters with -k, or -k auto")
    elif alone and not isinstance(options.k, int):
        raise UserError(f"--method {options.method} needs a number of clusters, such as -k 8")
    if options.method == "tfidf" and bool(options.run) == bool(options.corpus):
        raise UserError(
            "tfidf clusters documents; name a RUN with --run, or text with --corpus, and not both"
        )


def _number(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number wanted, or auto; got {text!r}") from None


def _rename_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "clusters", metavar="DIR", help="directory that xelm cluster wrote, or a RUN"
    )
    parser.add_argument(
        "names",
        metavar="OLD=NEW",
        nargs="+",
        help="name of a cluster or an expert, and the new one",
    )


def _rename(options: argparse.Namespace) -> None:
    from clustering.clustering import Clustering
    from xelm.api import open_run
    from xelm.runs.cluster import save_with_figures

    pairs = [given.partition("=") for given in options.names]
    for old, equals, new in pairs:
        if not equals or not old:
            raise UserError(f"OLD=NEW wanted, such as en-plus7=germanic; got {old}{equals}{new}")
        check_name(new)
    if len({old for old, _, _ in pairs}) < len(pairs):
        raise UserError(f"a cluster or an expert is renamed twice: {', '.join(options.names)}")
    new_names = {old: new for old, _, new in pairs}
    if (Path(options.clusters) / "run.json").exists():
        registry = open_run(options.clusters).rename(new_names)
        lines = [f"{old} is now {new}" for old, new in new_names.items()]
        facts = [e.reference for e in registry.experts if e.name in new_names.values()]
        show(options, {"renamed": new_names, "experts": facts}, "\n".join(lines))
        return
    clustering = Clustering.load(options.clusters).renamed(new_names)
    save_with_figures(clustering, Path(options.clusters), overwrite=True)
    show(options, {"clusters": clustering.clusters}, clustering)


RENAME = Command(
    "rename clusters before xelm branch, or the experts of a RUN",
    _rename,
    _rename_options,
    on_run=False,
)
