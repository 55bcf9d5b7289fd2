"""What merging keeps: bits per byte of the seed, dense, the experts, and merges of all experts.

    python benchmarks/merging.py RUN --corpus CORPUS [--documents N]

Merges all published experts of RUN by each method, as published and with other scales, into
RUN/merges/, evaluates these beside the other models on CORPUS, and prints a table by language.
"experts" is the expert that serves the language; the best merge of a language is marked *. Merges
that exist already are used as they are.
"""

import argparse

from experts.merge_methods import MergeOptions
from xelm.api import open_run
from xelm.evaluation.options import EvaluationOptions
from xelm.evaluation.results import System

COLUMNS = 8
"""Largest number of languages beside each other in a table."""
COUNT = "1/n"
"""Scale that makes the sum of n differences their mean."""
MERGES = {
    "linear": ("linear", {}, "equal"),
    "linear-share": ("linear", {}, "share"),
    "linear-held-out": ("linear", {}, "held-out"),
    "task-arithmetic": ("task-arithmetic", {}, "equal"),
    "task-arithmetic-half-mean": ("task-arithmetic", {"scale": 0.5}, COUNT),
    "ties": ("ties", {}, "equal"),
    "ties-.3": ("ties", {"scale": 0.3}, "equal"),
    "dare-linear": ("dare-linear", {}, "equal"),
    "dare-linear-mean": ("dare-linear", {"scale": 1.0}, COUNT),
    "dare-ties": ("dare-ties", {}, "equal"),
    "dare-ties-.3": ("dare-ties", {"scale": 0.3}, "equal"),
    "model-stock": ("model-stock", {}, "equal"),
}
"""Name -> method, its options, and weights."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--corpus", required=True, metavar="CORPUS")
    parser.add_argument("--documents", type=int, metavar="N", help="of each language")
    options = parser.parse_args()
    run = open_run(options.run)
    count = len(run.registry().published())
    for name, (method, values, weights) in MERGES.items():
        if f"merges/{name}" not in run.combined():
            chosen = [1 / count] * count if weights == COUNT else weights
            run.merge(name=name, options=MergeOptions(method=method, **values), weights=chosen)
    measured = EvaluationOptions(
        routings=("language", "learned"), max_documents=options.documents, calibration_tokens=0
    )
    results = run.evaluate(options.corpus, measured)
    bits = {(System(r.system, r.routing), r.language): r.bits_per_byte for r in results.rows}
    systems = [System("seed"), System("dense"), System("ensemble", "language")]
    merged = [System(f"merges/{name}") for name in MERGES]
    languages = [tag for tag in dict.fromkeys(tag for _, tag in bits) if tag in run.languages]
    grown = [t for e in run.registry().published() if e.cluster is None for t in e.languages]
    shown = [*languages, *(tag for tag in grown if (systems[0], tag) in bits)]
    mean = {s: sum(bits[s, tag] for tag in languages) / len(languages) for s in {*systems, *merged}}
    least = {tag: min(bits[system, tag] for system in merged) for tag in shown}
    for start in range(0, len(shown), COLUMNS):
        part = shown[start : start + COLUMNS]
        print("| bits a byte | " + " | ".join(part) + f" | mean of {len(languages)} |")
        print("|---" * (len(part) + 2) + "|")
        for system in [*systems, *merged]:
            title = "experts" if system.routing else system.name.removeprefix("merges/")
            stars = ["*" if system in merged and bits[system, t] == least[t] else "" for t in part]
            cells = [f"{bits[system, tag]:.2f}{star}" for tag, star in zip(part, stars)]
            print(f"| {title} | " + " | ".join(cells) + f" | {mean[system]:.3f} |")
        print()


if __name__ == "__main__":
    main()
