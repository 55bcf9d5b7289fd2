"""Where the gain of experts over a dense model begins and how it grows: over width and tokens.

    python benchmarks/sweep.py --data DATA --out OUT --widths 64,128 --tokens 5e5,1e6,2e6

For each width one seed is trained; dense and each system continue it at each budget, with the peak
rate and rows a step given on the command line for each side. OUT/sweep.json and OUT/sweep.md have
mean perplexities over the sixteen languages, the changes, and how many languages are better. The
command can be killed and run again.
"""

import argparse
from collections.abc import Mapping
from concurrent.futures import Future, as_completed
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
from systems import (
    LANGUAGES,
    Rates,
    evaluated,
    halves,
    kind_of,
    model_of,
    perplexities,
    routings_of,
    train_system,
)
from workers import workers

from clustering.files import write_json
from xelm.config import RunConfig
from xelm.presets import tiny
from xelm.process import prepare
from xelm.runs.init import init
from xelm.runs.options import InitOptions
from xelm.runs.run import Run
from xelm.settings import override


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--widths", default="64,128", help="of the residual stream")
    parser.add_argument("--tokens", default="5e5,1e6,2e6", help="of each system")
    parser.add_argument("--systems", default="typology-k8", help="as in reproduce.py")
    parser.add_argument("--dense", default="5e-4,64", help="peak rate and rows a step of dense")
    parser.add_argument("--experts", default="5e-4,4", help="the same of the experts")
    parser.add_argument("--jobs", type=int, default=1, help="systems trained in parallel")
    parser.add_argument("--max-documents", type=int, default=40)
    parser.add_argument("--set", dest="settings", action="append", default=[])
    options = parser.parse_args()
    prepare()
    data, out = Path(options.data), Path(options.out)
    corpus = halves(data, out, options.max_documents)["test"]
    systems = ("dense", *options.systems.split(","))
    experts = _setting(options.experts)
    rates = {"dense": _setting(options.dense), "k4": experts, "k8": experts}
    budgets = [round(float(text)) for text in options.tokens.split(",")]
    widths = [int(text) for text in options.widths.split(",")]
    configs = {width: _of_width(override(tiny(), options.settings), width) for width in widths}
    with workers(options.jobs) as pool:
        bases = {width: pool.submit(_seed, data, out, configs[width]) for width in widths}
        work: dict[Future, tuple[int, int, str]] = {}
        for point in product(widths, budgets, systems):
            width, tokens, system = point
            arguments = (bases[width].result(), configs[width], corpus, tokens, system, rates)
            work[pool.submit(_point, *arguments)] = point
        found: dict[tuple[int, int, str], np.ndarray] = {}
        for future in as_completed(work):
            found[work[future]] = future.result()
            _write(out, configs, rates, {p: found[p] for p in work.values() if p in found})
    print((out / "sweep.md").read_text())


def _name(system: str, tokens: int, rates: Rates) -> str:
    rate, rows = rates[kind_of(system)]
    return f"{system}-{tokens}-rate{rate:g}-rows{rows}"


def _seed(data: Path, out: Path, config: RunConfig) -> Run:
    folder = out / f"width-{model_of(config).width}"
    return init(folder / "base", data / "corpus", config, InitOptions(languages=LANGUAGES))


def _point(
    base: Run, config: RunConfig, corpus: Path, tokens: int, system: str, rates: Rates
) -> np.ndarray:
    """Perplexities of one system after so many tokens, by language."""
    budget = replace(config, experts=replace(config.experts, tokens=tokens))
    run = train_system(base, budget, system, rates, 0, _name(system, tokens, rates))
    return np.asarray(perplexities(evaluated(run, corpus, routings_of(system)[:1]), system))


def _setting(text: str) -> tuple[float, int]:
    rate, batch = text.split(",")
    return float(rate), int(batch)


def _of_width(config: RunConfig, width: int) -> RunConfig:
    """The Llama shape at another width, heads of 32."""
    model = replace(
        model_of(config),
        width=width,
        feedforward_width=-(-width * 8 // 3 // 8) * 8,
        head_count=width // 32,
        key_head_count=width // 32,
        head_size=32,
    )
    return replace(config, model=model)


def _write(
    out: Path,
    configs: Mapping[int, RunConfig],
    rates: Rates,
    found: Mapping[tuple[int, int, str], np.ndarray],
) -> None:
    """sweep.json with every figure, sweep.md the table; changes where dense is done already."""
    rows, lines = [], []
    for (width, tokens, system), scores in found.items():
        model = model_of(configs[width])
        row = {
            "width": width,
            "parameters": model.parameter_count,
            "seed_tokens": configs[width].seed.tokens,
            "tokens": tokens,
            "system": system,
            "perplexity": float(scores.mean()),
            "by_language": dict(zip(LANGUAGES, scores.tolist())),
        }
        change = better = ""
        dense = found.get((width, tokens, "dense"))
        if dense is not None and system != "dense":
            row["change"] = float(scores.mean() / dense.mean() - 1)
            row["better"] = int((scores < dense).sum())
            change, better = f"{row['change']:+.1%}", f"{row['better']} of {len(LANGUAGES)}"
        rows.append(row)
        lines.append(
            f"| {width} | {row['parameters']:,} | {row['seed_tokens']:,} | {tokens:,} | {system} "
            f"| {row['perplexity']:.2f} | {change} | {better} |"
        )
    write_json(out / "sweep.json", {"format": 1, "rates": rates, "rows": rows})
    head = [
        "| width | parameters | seed tokens | tokens | system | perplexity | change | better |",
        "|---|---|---|---|---|---|---|---|",
    ]
    (out / "sweep.md").write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
