"""Experts that cost little: their size on disk, and what they learn and forget, at equal tokens.

    python benchmarks/cheap_experts.py RUN OUT [--experts de-ru,ar-sw] [--arms full,lora-8,...]

RUN has trained experts of clusters of languages; it is copied to OUT/RUN, where the same experts
are made again, arm by arm, each as a further version. Every version is one line of
OUT/results.jsonl; the same command goes on where it was interrupted, and ends with the table.

    full         the expert that is there
    again        the same training, with its rows in another order: what chance does
    lora-R       adapters of rank R of all dense layers are trained in place of the weights
    lora-RxN     the same at N times the learning rate
    frozen-L     all but the layers L is trained, such as frozen-1 or frozen-4-7
    pull-X       all is trained, with a decay of X toward the seed
    svd-R        `full`, each matrix with a difference of rank R to the seed
    energy-X     `full`, each matrix with the share X of the squares of its singular values
    reverted-L   `full`, with the layers L of the seed

Figures are bits a byte on the RUN's held-out documents: of the expert's own languages, and of all
others, where the difference to the seed is what it forgets.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experts.expert import Expert
from xelm.api import Run, open_run
from xelm.commands.options import names
from xelm.models.checkpoint import load_parameters, read_config
from xelm.runs.gate import evaluate_held_out
from xelm.runs.jobs import expert_job
from xelm.runs.options import AgainOptions, CompressOptions
from xelm.runs.shares import expert_text
from xelm.training.trainable import divide

ARMS = (
    *("full", "again", "lora-4", "lora-16", "lora-16x3", "lora-64", "frozen-1", "pull-10"),
    *("svd-4", "svd-8", "svd-16", "svd-24", "energy-0.9", "reverted-1"),
)
# Every version is published, whatever its figures, which are measured on all languages.
_GATE = ("gate.worse=null", "gate.others=1000")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="RUN with trained experts of clusters")
    parser.add_argument("out", type=Path, help="folder for the copy and the results")
    parser.add_argument("--experts", type=names, help="experts (default: all of clusters)")
    parser.add_argument("--arms", type=names, default=ARMS)
    options = parser.parse_args()
    place, results = options.out / "RUN", options.out / "results.jsonl"
    if not place.exists():
        options.out.mkdir(parents=True, exist_ok=True)
        partial = options.out / ".RUN.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(options.run, partial)
        partial.rename(place)
    lines = _lines(results)
    known = [e.name for e in open_run(place).registry().experts if e.cluster and e.version == 1]
    for name in options.experts or known:
        for arm in options.arms:
            if not any((each["expert"], each["arm"]) == (name, arm) for each in lines):
                lines.append(_measured(place, name, arm))
                with results.open("a") as file:
                    print(json.dumps(lines[-1]), file=file, flush=True)
    _print(lines, options.arms)


def _measured(place: Path, name: str, arm: str) -> dict[str, Any]:
    kind, _, value = arm.partition("-")
    rate = open_run(place).config.experts.optimizer.learning_rate
    rank, _, times = value.partition("x")
    settings = {
        "lora": [
            f"experts.lora.rank={rank}",
            f"experts.optimizer.learning_rate={rate * float(times or 1)}",
        ],
        "frozen": [f"experts.frozen_layers={value}"],
        "pull": [f"experts.optimizer.pull={value}"],
    }
    run = open_run(place, settings=[*_GATE, *settings.get(kind, [])])
    if run.registry().expert(name).version != 1:
        run.rollback(name, 1)
    expert = run.registry().expert(name, 1)
    if kind in ("again", *settings):
        expert = run.train_again(name, options=AgainOptions(start="seed"))
    elif kind == "svd":
        expert = run.compress(name, CompressOptions(rank=int(value)))
    elif kind == "energy":
        expert = run.compress(name, CompressOptions(energy=float(value)))
    elif kind == "reverted":
        expert = run.compress(name, CompressOptions(revert=value))
    figures = evaluate_held_out(run, expert, expert_text(run, expert).held_out)
    folder = expert.directory(place)
    return {
        "expert": name,
        "arm": arm,
        "tokens": expert.tokens,
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "trained": _trained(run, expert) if kind in ("full", "again", *settings) else None,
        "figures": figures,
    }


def _trained(run: Run, expert: Expert) -> int:
    """Number of parameters that a training changes."""
    shape, config = read_config(run.seed), expert_job(run, expert).config
    trained, _ = divide(load_parameters(run.seed, shape), config, shape)
    return sum(leaf.size for leaf in jax.tree.leaves(trained))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _print(lines: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> None:
    print("| expert | weights, MB | trained, M | own languages | others | forgotten |")
    print("|---|---|---|---|---|---|")
    experts = {each["expert"] for each in lines}
    rows = {arm: [each for each in lines if each["arm"] == arm] for arm in arms}
    rows = {arm: some for arm, some in rows.items() if {e["expert"] for e in some} == experts}
    seed = {"seed": rows["full"]} if "full" in rows else {}
    for arm, some in {**seed, **rows}.items():
        model = "seed" if arm == "seed" else "expert"
        own, others = _mean(some, "own", model), _mean(some, "others", model)
        forgotten = others - _mean(some, "others", "parent" if model == "expert" else model)
        size = sum(each["bytes"] for each in some) / len(some) / 1e6
        trained = [each["trained"] for each in some if each["trained"] is not None]
        count = f"{sum(trained) / len(trained) / 1e6:.3f}" if trained and arm != "seed" else "-"
        shown = "-" if arm == "seed" else f"{size:.2f}"
        print(f"| {arm} | {shown} | {count} | {own:.3f} | {others:.3f} | {forgotten:+.3f} |")
    print(f"\nmeans over {len(experts)} experts: {', '.join(sorted(experts))}")


def _mean(lines: Sequence[Mapping[str, Any]], part: str, model: str) -> float:
    """Mean over experts of the mean over languages. Others are compared with the parent, which is
    the seed."""
    model = "parent" if (part, model) == ("others", "seed") else model
    means = []
    for line in lines:
        found = line["figures"][part].values()
        means.append(sum(each[model] for each in found) / len(found))
    return sum(means) / len(means)


if __name__ == "__main__":
    main()
