"""The tables of the page, as rows."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clustering.clustering import Clustering
from xelm.data.corpus import Corpus
from xelm.evaluation.cells import router_cells, score_cells, text_cells
from xelm.evaluation.report.facts import Facts, Group
from xelm.evaluation.report.verdict import Comparison
from xelm.evaluation.report.words import count, signed, typeset
from xelm.evaluation.results import DENSE, SEED, System


def sizes(facts: Facts) -> list[tuple[str, str]]:
    """Sizes of the RUN: numbers, and what each counts."""
    rows = [(str(len(facts.languages)), "languages of the corpus")]
    rows += [(str(len(facts.clusters.clusters)), "clusters")] if facts.clusters else []
    rows += [(str(len(facts.published)), "experts published")]
    if facts.model:
        rows.append((count(facts.model.parameter_count), "parameters in each model"))
        rows.append((f"{facts.model.vocabulary_size:,}", "pieces in the vocabulary"))
    trained = {
        "tokens for the seed": facts.tokens(SEED),
        "tokens for the experts of clusters": facts.branched_tokens,
        "tokens for dense": facts.tokens(DENSE),
        "tokens more for grown experts": sum(expert.tokens for expert in facts.grown),
    }
    return rows + [(count(tokens), what) for what, tokens in trained.items() if tokens]


def language_table(
    facts: Facts, comparison: Comparison | None
) -> list[tuple[Group, list[dict[str, Any]]]]:
    """Scores by language and system, languages by group; empty before an evaluation."""
    table = []
    for group in facts.groups:
        rows = [
            {
                "tag": tag,
                "scores": [facts.scores[system].get(tag) for system in facts.systems],
                "change": comparison and comparison.change_over([tag]),
                "marks": facts.texts[tag].marks if tag in facts.texts else "",
            }
            for tag in facts.evaluated
            if tag in group.languages
        ]
        table += [(group, rows)] if rows else []
    return table


def text_table(facts: Facts) -> list[list[str]]:
    """Statistics of the evaluated text, a row for each language; none before an evaluation."""
    rows = []
    for tag in facts.evaluated:
        if tag in facts.texts:
            documents, _, _, rate, unknown, byte_pieces, _, trained = text_cells(facts.texts[tag])
            shown = (documents, rate, unknown, byte_pieces, trained)
            rows.append([tag, *map(typeset, shown)])
    return rows


def certainty_table(facts: Facts) -> list[list[str]]:
    """Means with intervals, calibration, and statistics of routers, by system."""
    rows = []
    for each in facts.summaries:
        system = System(each.system, each.routing)
        if system in facts.systems:
            *bits, _, error, brier = score_cells(each)
            right, _, _, read, regret = router_cells(each)
            rows.append([system.title, *map(typeset, (*bits, error, brier, right, read, regret))])
    return rows


def cluster_table(facts: Facts, comparison: Comparison | None) -> list[dict[str, Any]]:
    """Rows of the clusters: languages, documents or distance within, change of the mean."""
    clusters = facts.clusters
    if clusters is None:
        return []
    return [
        {
            "group": group,
            "languages": clusters.clusters[group.name],
            "documents": clusters.documents and sum(clusters.documents[group.name].values()),
            "within": _distance_within(clusters, clusters.clusters[group.name]),
            "change": comparison
            and comparison.change_over([t for t in group.languages if t in comparison.languages]),
        }
        for group in facts.groups
        if group.name in clusters.clusters
    ]


def expert_table(facts: Facts) -> list[dict[str, Any]]:
    """Rows of the experts in use or in training for the first time."""
    rows, single = [], {s.system: s for s in facts.summaries if s.routing is None}
    for expert in facts.experts:
        published = expert.status == "published"
        summary = single.get(expert.name) if published else None
        tokens = expert.tokens if published else facts.tokens(System(expert.name))
        share = "extra" if published else "–"
        if published and expert.cluster is not None and facts.branched_tokens:
            share = f"{100 * tokens / facts.branched_tokens:.1f} %"
        row = {"expert": expert, "colour": facts.colour(expert), "tokens": tokens, "share": share}
        lost, gap = (summary.forgetting, summary.transfer_gap) if summary else (None, None)
        row["forgotten"] = "–" if lost is None else signed(lost.value, 3)
        row["gap"] = "–" if gap is None else f"{signed(100 * gap.value)} %"
        rows.append(row)
    return rows


def making(facts: Facts) -> list[tuple[str, str]]:
    """Settings of the training and the evaluation, as recorded."""
    record, results = facts.record, facts.results
    origin = record.get("seed_from")
    rows = {key: record.get(key) for key in ("command", "xelm")}
    rows["corpus"] = str(Corpus.of(record["corpus"])) if "corpus" in record else None
    rows["seed"] = "trained here" if origin is None else f"copied from {origin}"
    if facts.clusters is not None:
        parameters = facts.clusters.parameters
        plain = {k: v for k, v in parameters.items() if not isinstance(v, dict | list)}
        rows["clusters"] = ", ".join([facts.clusters.method, *map(" ".join, settings(plain))])
    if results:
        rows["evaluated on"] = results.get("corpus")
        rows["evaluated by xelm"] = results.get("xelm")
        if "context_length" in results:
            rows["tokens read at once"] = results["context_length"]
            rows["tokens from one window to the next"] = results["stride"]
        rows["documents of each language"] = results.get("max_documents") or "all"
        rows["experts with weight at a token"] = results.get("top_m") or "all"
        rows["temperature of TF-IDF routing"] = results.get("temperature") or "default"
    return [(name, "–" if value is None else str(value)) for name, value in rows.items()]


def hashes(facts: Facts) -> list[tuple[str, str]]:
    """SHA-256 hashes of the inputs and of the checkpoints."""
    rows = [("corpus", facts.record.get("corpus_sha256", "–"))]
    if facts.results:
        rows.append(("corpus of the evaluation", facts.results.get("corpus_sha256", "–")))
    made = {"seed": facts.registry.seed_sha256}
    made |= {expert.path: expert.sha256 for expert in facts.experts}
    return rows + [(f"{path}/{f}", sha) for path, files in made.items() for f, sha in files.items()]


def settings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """A configuration under the names that `--set` takes."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from settings(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)


def _distance_within(clusters: Clustering, members: Sequence[str]) -> str | None:
    """Mean distance over the pairs of languages in a cluster."""
    if clusters.distances is None:
        return None
    index = [clusters.languages.index(tag) for tag in members]
    pairs = [clusters.distances.values[i, j] for i in index for j in index if i < j]
    return f"{np.mean(pairs):.2f}" if pairs else "–"
