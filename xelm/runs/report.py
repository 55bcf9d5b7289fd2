"""`xelm report`: reads a RUN, finished or not, and writes one self-contained HTML page about it."""

from pathlib import Path
from typing import Any

from clustering.files import read_object
from experts.registry import Registry
from xelm.evaluation.report.facts import Facts, Score, grouped
from xelm.evaluation.report.page import write_report
from xelm.evaluation.results import DENSE, SEED, System
from xelm.models.families import model_config
from xelm.runs.results import read_results
from xelm.runs.run import Run
from xelm.training.metrics import HELD_OUT, METRICS, read_metrics


def report(run: Run) -> Path:
    """Writes RUN/results/report.html and RUN/results/figures; returns the page's path. Opens no
    model, needs no JAX, and writes the same bytes for the same RUN."""
    return write_report(read(run), run.results)


def read(run: Run) -> Facts:
    """The facts of a RUN, finished or not; UserError for a damaged file."""
    directory, config = run.directory, run.seed / "config.json"
    begun = (directory / "registry.json").exists()
    registry = run.registry() if begun else Registry(seed_sha256={})
    clusters = run.clusters() if (directory / "clusters.json").exists() else None
    results = read_results(run)
    scores: dict[System, dict[str, Score]] = {}
    for row in results.rows:
        score = Score(row.perplexity, row.bits_per_byte)
        scores.setdefault(System(row.system, row.routing), {})[row.language] = score
    shown = (*registry.training(), *registry.published())
    newest = {expert.name: expert for expert in shown if not expert.intermediate}
    order = {name: place for place, name in enumerate(clusters.clusters if clusters else ())}
    place = {name: order.get(e.cluster or "", len(order)) for name, e in newest.items()}
    experts = sorted(newest.values(), key=lambda e: (e.round, place[e.name], e.name))
    folders = {SEED: run.seed, DENSE: run.dense}
    folders |= {System(expert.name): expert.directory(directory) for expert in experts}
    return Facts(
        name=directory.resolve().name,
        languages=run.languages,
        record=run.record,
        registry=registry,
        experts=experts,
        has_dense=run.dense.exists(),
        model=model_config(read_object(config)) if config.exists() else None,
        clusters=clusters,
        results=results.record,
        scores=scores,
        summaries=results.summaries,
        texts=results.texts,
        metrics={each: _lines(run, each, path, METRICS) for each, path in folders.items()},
        held_out={each: _lines(run, each, path, HELD_OUT) for each, path in folders.items()},
        groups=list(grouped(run.languages, clusters, experts, scores)),
    )


def _lines(run: Run, system: System, folder: Path, name: str) -> list[dict[str, Any]]:
    """Lines of a file of a training, finished or not."""
    return read_metrics(folder / name) or read_metrics(run.training(system.name) / name)
