"""What one model keeps of the ensemble: students, mixtures of experts and the mean beside dense.

    python benchmarks/one_model.py RUN --corpus CORPUS [--documents N]

Makes the models of `STUDENTS` and `MIXES` of all published experts of RUN, unless they exist, and
the mean of the experts; evaluates these beside the other models on CORPUS, and prints a table.
"kept" is the share of what the ensemble, by learned routing, saves of dense's bits a byte (the mean
over the languages of RUN's corpus). "tokens" are those that a model was trained on after the seed,
its experts' included; "teacher" those that the experts read for a student's teacher, together.
"""

import argparse
import json
from typing import Literal

from xelm.api import Run, open_run
from xelm.evaluation.options import EvaluationOptions
from xelm.evaluation.results import System
from xelm.models.checkpoint import read_config
from xelm.runs.options import DistilOptions, MixOptions
from xelm.training.metrics import trained_tokens

STUDENTS = {
    "t16-s.5": DistilOptions(),
    "t64-s.5": DistilOptions(top=64),
    "t64-s.9": DistilOptions(top=64, teacher_share=0.9),
    "t16-s1": DistilOptions(teacher_share=1.0),
}
"""Students by name: number of the teacher's tokens, and its share of the loss."""
MIXES: dict[str, tuple[float, Literal["router", "all"]]] = {
    "routers-.05": (0.05, "router"),
    "all-.05": (0.05, "all"),
    "all-1": (1.0, "all"),
}
"""Mixtures by name: tokens as a share of those of all experts, and what is trained."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--corpus", required=True, metavar="CORPUS")
    parser.add_argument("--documents", type=int, metavar="N", help="of each language")
    options = parser.parse_args()
    run = open_run(options.run)
    _make(run)
    measured = EvaluationOptions(
        routings=("language", "learned"), max_documents=options.documents, calibration_tokens=0
    )
    results = run.evaluate(options.corpus, measured)
    bits = {(System(r.system, r.routing), r.language): r.bits_per_byte for r in results.rows}
    languages = [tag for tag in dict.fromkeys(tag for _, tag in bits) if tag in run.languages]
    systems = [
        *(System("seed"), System("dense"), System("merges/mean")),
        *(System(f"students/{name}") for name in STUDENTS),
        *(System(f"mixes/{name}") for name in MIXES),
        *(System("ensemble", "language"), System("ensemble", "learned")),
    ]
    mean = {s: sum(bits[s, tag] for tag in languages) / len(languages) for s in systems}
    gain = mean[System("dense")] - mean[systems[-1]]
    columns = ("bits a byte", "kept", "parameters", "active", "tokens", "teacher")
    print(f"| mean of {len(languages)} | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for system in systems:
        kept = (mean[System("dense")] - mean[system]) / gain
        cells = [f"{mean[system]:.3f}", f"{kept:+.0%}", *_costs(run, system)]
        print(f"| {system.title} | {' | '.join(cells)} |")


def _make(run: Run) -> None:
    known = run.combined()
    if "merges/mean" not in known:
        run.merge(name="mean")
    for name, options in STUDENTS.items():
        if f"students/{name}" not in known:
            run.distil(name, options)
    for name, (share, trained) in MIXES.items():
        if f"mixes/{name}" not in known:
            tokens = round(share * run.config.dense.tokens)
            run.mix(name, MixOptions(tokens=tokens, train=trained))


def _costs(run: Run, system: System) -> list[str]:
    """Parameters, those that a token uses, tokens of training, and tokens that a teacher read."""
    experts = run.registry().published()
    ours = sum(expert.tokens for expert in experts)
    one = read_config(run.seed).parameter_count
    if system.routing:
        active = "" if system.routing == "learned" else f"{one:,}"
        return [f"{len(experts) * one:,}", active, f"{ours:,}", ""]
    if system.name == "seed":
        return [f"{one:,}", f"{one:,}", "0", ""]
    if system.name == "dense":
        return [f"{one:,}", f"{one:,}", f"{trained_tokens(run.dense):,}", ""]
    path = run.combined()[system.name]
    shape = read_config(path)
    sizes = [f"{shape.parameter_count:,}", f"{shape.active_parameter_count:,}"]
    if system.name.startswith("merges/"):
        return [*sizes, f"{ours:,}", ""]
    recipe = json.loads((path / "recipe.json").read_text())
    if read := recipe.get("teacher_tokens_read"):
        return [*sizes, f"{trained_tokens(path):,}", f"{read:,}"]
    return [*sizes, f"{ours + trained_tokens(path):,}", ""]


if __name__ == "__main__":
    main()
