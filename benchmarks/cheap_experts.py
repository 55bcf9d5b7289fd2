"""Experts that cost little: their size on disk, the memory of their training, and what they learn
and forget, at equal tokens.

    python benchmarks/cheap_experts.py RUN OUT
        [--experts de-ru,ar-sw] [--seeds 3] [--arms full,lora-8,...]

RUN has trained experts of clusters of languages. They are made again from the seed, arm by arm,
each as a further version in a copy of RUN. Every one is a line of OUT/results.jsonl; the same
command goes on where it was interrupted, and ends with the table.

    full         all weights are trained
    lora-R       adapters of rank R of all dense layers are trained in place of the weights
    lora-RxN     the same at N times the learning rate
    frozen-L     all but the layers L is trained, such as frozen-1, frozen-4-7 or frozen-middle
    pull-X       all is trained, with a decay of X toward the seed
    svd-R        `full`, each matrix with a difference of rank R to the seed
    energy-X     `full`, each matrix with the share X of the squares of its singular values
    reverted-L   `full`, with the layers L of the seed

Figures are bits a byte on the RUN's held-out documents: of the expert's own languages, and of all
others, where the difference to the seed is what it forgets. Memory is that of a training step, by
the compiler's account (`benchmarks/memory.py`). A random seed draws the order of the rows, the same
in all arms, and the first factors of adapters; the RUN with its seed model is the same.
"""

import argparse
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from memory import step_bytes
from trials import Line, add, interval, read

from experts.expert import SEED, Expert
from xelm.api import Run, open_run
from xelm.commands.options import names
from xelm.models.checkpoint import load_parameters, read_config
from xelm.runs.jobs import expert_job
from xelm.runs.options import AgainOptions, CompressOptions
from xelm.training.sharding import make_mesh
from xelm.training.trainable import divide

ARMS = (
    *("full", "lora-4", "lora-16", "lora-16x3", "lora-64", "frozen-1", "pull-10"),
    *("svd-8", "svd-16", "svd-24", "energy-0.9", "reverted-1"),
)
COMPRESSED = ("svd", "energy", "reverted")
"""Kinds of arms that are made from `full`, without a training of their own."""
# Every version is published, whatever its figures, which are measured on all languages.
GATE = ("gate.worse=null", "gate.others=1000")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="RUN with trained experts of clusters")
    parser.add_argument("out", type=Path, help="folder for the copies and the results")
    parser.add_argument("--experts", type=names, help="experts (default: all of clusters)")
    parser.add_argument("--seeds", type=int, default=3, help="number of random seeds")
    parser.add_argument("--arms", type=names, default=ARMS)
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    known = [e.name for e in open_run(options.run).registry().published() if e.cluster]
    experts = options.experts or known
    for trial in () if options.table else trials(experts, options.seeds, options.arms):
        if not any(trial.items() <= line.items() for line in read(results)):
            add(results, trial | measured(options.run, options.out, trial))
    print(table(read(results), options.arms))


def trials(experts: Sequence[str], seeds: int, arms: Sequence[str]) -> Iterator[Line]:
    """Everything that is to be measured, one random seed after the other."""
    for random_seed in range(seeds):
        for name in experts:
            for arm in arms:
                yield {"expert": name, "arm": arm, "random_seed": random_seed}


def measured(source: Path, out: Path, trial: Mapping[str, Any]) -> Line:
    """Makes the expert of a trial in a copy of a RUN; returns what it costs, learns and forgets."""
    kind, _, value = trial["arm"].partition("-")
    if kind == "full" or kind in COMPRESSED:
        whole = out / "full" / f"{trial['expert']}-{trial['random_seed']}"
        if not whole.exists():
            _trained(_copied(source, out), trial, "full", "")
            whole.parent.mkdir(exist_ok=True)
            (out / "copy").rename(whole)
        run = open_run(whole)
        if kind in COMPRESSED:
            run = _compressed(_copied(whole, out), trial["expert"], kind, value)
    else:
        run = _trained(_copied(source, out), trial, kind, value)
    expert = run.registry().in_use(trial["expert"])
    files = expert.directory(run.directory).glob("*.safetensors")
    found = {
        "tokens": expert.tokens,
        "bytes": sum(file.stat().st_size for file in files),
        **({} if kind in COMPRESSED else _costs(run, expert)),
        "figures": expert.evaluation,
    }
    shutil.rmtree(out / "copy", ignore_errors=True)
    return found


def _copied(source: Path, out: Path) -> Path:
    """A new copy of a RUN, in the place of the one before."""
    shutil.rmtree(out / "copy", ignore_errors=True)
    return shutil.copytree(source, out / "copy")


def _trained(place: Path, trial: Mapping[str, Any], kind: str, value: str) -> Run:
    """The RUN, in which the expert of a trial was trained again from the seed."""
    config = open_run(place).config.experts
    first = config.random_seed + 100 * trial["random_seed"]
    # What would be grown from them counts up from there.
    settings = [f"experts.random_seed={first}", f"grow.random_seed={first + 1}"]
    if kind == "lora":
        rank, _, times = value.partition("x")
        rate = config.optimizer.learning_rate * float(times or 1)
        settings += [f"experts.lora.rank={rank}", f"experts.optimizer.learning_rate={rate}"]
    elif kind == "frozen":
        settings.append(f"experts.frozen_layers={value}")
    elif kind == "pull":
        settings.append(f"experts.optimizer.pull={value}")
    elif kind != "full":
        raise SystemExit(f"there is no arm {trial['arm']!r}")
    run = open_run(place, settings=[*GATE, *settings])
    run.train_again(trial["expert"], options=AgainOptions(start=SEED))
    return run


def _compressed(place: Path, name: str, kind: str, value: str) -> Run:
    """The RUN, in which less is stored of the version of an expert that is in use."""
    run = open_run(place, settings=GATE)
    if kind == "svd":
        run.compress(name, CompressOptions(rank=int(value)))
    elif kind == "energy":
        run.compress(name, CompressOptions(energy=float(value)))
    else:
        run.compress(name, CompressOptions(revert=value))
    return run


def _costs(run: Run, expert: Expert) -> Line:
    """Number of parameters that a training changes, and bytes of memory of a step."""
    shape, config = read_config(run.seed), expert_job(run, expert).config
    trained, _ = divide(load_parameters(run.seed, shape), config, shape)
    return {
        "trained": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "step_bytes": step_bytes(shape, config, make_mesh(config)),
    }


def table(lines: Sequence[Line], arms: Sequence[str]) -> str:
    """Markdown: what each arm costs, learns and forgets; means over experts, and over random seeds
    with their 95% interval."""
    experts = sorted({line["expert"] for line in lines})
    rows = [
        "| expert | weights, MB | trained, M | memory, MB | own languages | others | forgotten |",
        "|---|---|---|---|---|---|---|",
    ]
    counts = []
    for arm in arms:
        # Only random seeds with every expert are compared.
        full = [some for some in _by_seed(lines, arm) if len(some) == len(experts)]
        if not full:
            continue
        own = [_bits(some, "own", "expert") for some in full]
        others = [_bits(some, "others", "expert") for some in full]
        before = _bits(full[0], "own", "seed"), _bits(full[0], "others", "parent")
        if not counts:
            rows.append(f"| seed | - | - | - | {before[0]:.3f} | {before[1]:.3f} | 0 |")
        counts.append(len(full))
        flat = [line for some in full for line in some]
        cells = [_millions(flat, "bytes", 2), _millions(flat, "trained", 3)]
        cells += [_millions(flat, "step_bytes", 1), interval(own), interval(others)]
        cells.append(interval([each - before[1] for each in others]))
        rows.append(f"| {arm} | {' | '.join(cells)} |")
    number = " or ".join(map(str, sorted(set(counts))))
    return "\n".join([*rows, "", f"random seeds: {number}; experts: {', '.join(experts)}"])


def _by_seed(lines: Sequence[Line], arm: str) -> list[list[Line]]:
    """The lines of an arm, those of each random seed together."""
    found: dict[int, list[Line]] = {}
    for line in lines:
        if line["arm"] == arm:
            found.setdefault(line["random_seed"], []).append(line)
    return list(found.values())


def _bits(lines: Sequence[Line], part: str, model: str) -> float:
    """Bits a byte of a model, "expert", "parent" or "seed", on the experts' "own" languages or on
    all "others": the mean over experts of the mean over languages."""
    means = [np.mean([each[model] for each in line["figures"][part].values()]) for line in lines]
    return float(np.mean(means))


def _millions(lines: Sequence[Line], key: str, digits: int) -> str:
    values = [line[key] for line in lines if line.get(key) is not None]
    return f"{np.mean(values) / 1e6:.{digits}f}" if values else "-"


if __name__ == "__main__":
    main()
