"""Clusters of languages or documents."""

import argparse
from pathlib import Path
from typing import Any

from clustering.errors import UserError
from xelm.commands.options import Verb, add_json, names, print_json

METHODS = ("typology", "tfidf", "random")


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
        type=names,
        metavar="A,B,C",
        help="languages to cluster (default: those of --run or --corpus)",
    )
    verb.add_argument(
        "--exclude", type=names, metavar="A,B", default=(), help="languages to leave in no cluster"
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
    add_json(verb)


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
        print_json({"clusters": clustering.clusters, "unassigned": clustering.unassigned})
    else:
        print(clustering)
        print(f"\nSaved in {options.out}")


CLUSTER = Verb("cluster languages or documents", _cluster_options, _cluster)


def _draw(clustering: Any, directory: Path) -> None:
    if clustering.of_documents:
        plots = {"composition": clustering.plot_composition}
    elif clustering.distances is None:
        plots = {}
    else:
        plots = {"tree": clustering.plot_tree, "distances": clustering.plot_distances}
    for name, plot in plots.items():
        plot().figure.savefig(directory / f"{name}.png", dpi=150, bbox_inches="tight")
