"""Ways to divide the languages among models, each trained from one seed on the same total of
tokens: what the experiments on real text share."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from clustering import control, tfidf, typology
from clustering.clustering import Clustering
from clustering.control import by_hand
from xelm.config import RunConfig
from xelm.data.contents import contents_of
from xelm.data.reading import read
from xelm.data.unusable import UnusableRecords
from xelm.evaluation.options import EvaluationOptions
from xelm.evaluation.results import Row
from xelm.models.config import ModelConfig
from xelm.runs.branch import branch
from xelm.runs.evaluate import evaluate
from xelm.runs.init import init
from xelm.runs.options import InitOptions
from xelm.runs.results import read_results
from xelm.runs.run import Run
from xelm.runs.train import train_dense, train_experts
from xelm.settings import vary

Setting = tuple[float, int]
"""Peak learning rate and rows a step."""
Rates = Mapping[str, Setting]
"""Kind of system (`kind_of`) -> its setting."""

# The sixteen of XGLM, as in the paper.
LANGUAGES = (
    *("ar", "bg", "de", "el", "en", "es", "fr", "hi"),
    *("ja", "ko", "ru", "sw", "tr", "ur", "vi", "zh"),
)
NEW_LANGUAGES = ("az", "he", "pl", "sv")


def halves(data: Path, out: Path, most: int) -> dict[str, Path]:
    """The validation documents, every second one for tuning, the others for the tables; of each
    language at most `most` for the tables, and half as many for tuning."""
    folders = {name: out / "valid" / name for name in ("tune", "test", "test-new")}
    for tag in (*LANGUAGES, *NEW_LANGUAGES):
        documents = list(read(data / "corpus_valid" / f"{tag}.jsonl.gz", UnusableRecords()))
        parts = {"tune": documents[::2][: -(-most // 2)], "test": documents[1::2][:most]}
        if tag in NEW_LANGUAGES:
            parts = {"test-new": parts["test"]}
        for name, part in parts.items():
            path = folders[name] / f"{tag}.jsonl"
            lines = [json.dumps({"text": d.text, "lang": d.language}) for d in part]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
    return folders


def train_system(
    base: Run,
    config: RunConfig,
    system: str,
    rates: Rates,
    repetition: int,
    name: str,
) -> Run:
    """A RUN beside `base`, with its seed, whose dense baseline or experts are trained."""
    rate, batch = rates[kind_of(system)]
    # Each apart from the seed's 0, so that nothing sees the same rows again in the same order.
    experts = replace(config.experts, random_seed=1 + 2 * repetition)
    grow = replace(config.grow, random_seed=2 + 2 * repetition)
    if system == "dense":
        config = replace(config, dense_learning_rate=rate, dense_batch_size=batch)
    else:
        experts, grow = (
            vary(p, {"optimizer.learning_rate": rate, "batch_size": batch}) for p in (experts, grow)
        )
    run = init(
        base.directory.parent / name,
        base.record["corpus"],
        replace(config, experts=experts, grow=grow),
        InitOptions(seed=base.seed, languages=LANGUAGES),
    )
    if system == "dense":
        train_dense(run)
        return run
    branched = (run.directory / "clusters.json").exists()
    # Branching that was interrupted resumes.
    branch(run, run.clusters() if branched else clusters_of(run, system, repetition))
    train_experts(run, run.untrained())
    return run


def model_of(config: RunConfig) -> ModelConfig:
    """The shape of the fresh seed of these experiments."""
    assert config.model is not None
    return config.model


def kind_of(system: str) -> str:
    """What systems with the same settings have in common: "dense", "k4", or "k8" of eight and more
    experts."""
    if system == "dense":
        return "dense"
    return "k4" if system.endswith("-k4") else "k8"


def clusters_of(run: Run, system: str, repetition: int) -> Clustering:
    method, k = system.split("-k")
    if method == "typology":
        return typology.cluster(LANGUAGES, int(k))
    if method == "random":
        return control.random_clusters(LANGUAGES, int(k), repetition)
    if method == "monolingual":
        return by_hand({language: [language] for language in LANGUAGES})
    return tfidf.cluster(run.documents(), run.vectoriser(), int(k), repetition)


def routings_of(system: str) -> Sequence[str]:
    """Clusters of documents have no expert of a language; those of languages go both ways."""
    if system == "dense":
        return ()
    return ("tfidf",) if system.startswith("tfidf") else ("language", "tfidf")


def perplexities(rows: Sequence[Row], system: str) -> list[float]:
    """By language, of the system's first routing."""
    key = ("dense", None) if system == "dense" else ("ensemble", routings_of(system)[0])
    found = {row.language: row.perplexity for row in rows if (row.system, row.routing) == key}
    return [found[language] for language in LANGUAGES]


def evaluated(run: Run, corpus: Path, routings: Sequence[str]) -> list[Row]:
    """The rows of a RUN on a corpus, from its results if they are of that corpus."""
    found = read_results(run)
    same_text = found.record.get("corpus_sha256") == contents_of(corpus).fingerprint()
    if same_text and set(routings) <= set(found.record["routings"]):
        return list(found.rows)
    return list(evaluate(run, corpus, EvaluationOptions(routings=routings)).rows)
