"""`xelm branch`: one expert for each cluster is recorded, to be trained."""

from collections.abc import Sequence

from clustering.clustering import Clustering
from clustering.errors import UserError
from clustering.files import remove_unfinished, write_arrays
from experts import manifest
from experts.branch import branch as branch_registry
from experts.lock import locked, update
from experts.registry import Registry
from xelm.runs.run import Run


def branch(run: Run, clustering: Clustering) -> Registry:
    """Records one expert for each cluster, to be trained, and saves the clustering in the RUN, with
    the cluster of every document in assignments.npz: language -> int32 [documents].

    UserError for a language of the corpus that is in no cluster, unless the clustering lists it as
    unassigned, and for clusters of documents that were made with other vectors than the RUN's.
    """
    check_languages(run.languages, clustering)
    vectoriser = clustering.vectoriser
    if vectoriser is not None and vectoriser != run.vectoriser():
        raise UserError(
            "these clusters of documents were made with other vectors than the RUN's; make them by "
            f"xelm cluster --method tfidf --run {run.directory}"
        )
    branched = (run.directory / "clusters.json").exists()
    trained = run.dense.exists() or run.training("dense").exists()
    if clustering.unassigned and trained and not branched:
        raise UserError(
            f"these clusters leave out {', '.join(clustering.unassigned)}, on which the dense "
            "baseline was trained; make another RUN without those languages"
        )
    written = ["clusters.json", "clusters.npz", "assignments.npz"]
    with locked(run.directory, "branch"):
        for name in written:
            remove_unfinished(run.directory / name)
        registry = update(
            run.directory, lambda registry: branch_registry(registry, clustering), "branch"
        )
        if not branched:
            clustering.save(run.directory)
        path = run.directory / "assignments.npz"
        if clustering.of_documents and not path.exists():
            texts = run.store().languages.items()
            labels = {t: clustering.assign(map(x.document, range(len(x)))) for t, x in texts}
            write_arrays(path, labels)
        manifest.record(run.directory, written, again=not branched)
    return registry


def check_languages(languages: Sequence[str], clustering: Clustering) -> None:
    """Raises UserError unless the clusters and `unassigned` contain exactly these languages."""
    missing = set(languages) - set(clustering.languages) - set(clustering.unassigned)
    unknown = set(clustering.languages) - set(languages)
    if missing or unknown:
        where = [f"not in the clusters: {', '.join(sorted(missing))}"] if missing else []
        where += [f"not in the RUN: {', '.join(sorted(unknown))}"] if unknown else []
        raise UserError(
            f"clusters and RUN have different languages ({'; '.join(where)}); cluster those of the "
            "corpus (cluster --corpus), or take fewer of them (init --languages)"
        )
