"""Where the gain of experts over a dense model begins and how it grows: over width and tokens.

    python benchmarks/sweep.py --data DATA --out OUT --widths 64,128 --tokens 5e5,1e6,2e6

For each width one seed is trained; dense and each system continue it at each budget, with the peak
rate and rows a step given on the command line for each side. OUT/sweep.json and OUT/sweep.md have
mean perplexities over the sixteen languages, the changes, and how many languages are better. The
command can be killed and run again.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from systems import LANGUAGES, evaluated, halves, kind_of, perplexities, routings_of, train_system

from xelm.cli import prepare
from xelm.config import RunConfig, override
from xelm.presets import tiny
from xelm.runs.init import init


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--widths", default="64,128", help="of the residual stream")
    parser.add_argument("--tokens", default="5e5,1e6,2e6", help="of each system")
    parser.add_argument("--systems", default="typology-k8", help="as in reproduce.py")
    parser.add_argument("--dense", default="1e-3,16", help="peak rate and rows a step of dense")
    parser.add_argument("--experts", default="1e-3,4", help="the same of the experts")
    parser.add_argument("--max-documents", type=int, default=40)
    parser.add_argument("--set", dest="settings", action="append", default=[])
    options = parser.parse_args()
    prepare()
    data, out = Path(options.data), Path(options.out)
    corpus = halves(data, out, options.max_documents)["test"]
    systems = ("dense", *options.systems.split(","))
    rates = {kind_of(system): _setting(options.experts) for system in systems}
    rates["dense"] = _setting(options.dense)
    rows = []
    for width in map(int, options.widths.split(",")):
        config = _of_width(override(tiny(), options.settings), width)
        folder = out / f"width-{width}"
        base = init(folder / "base", data / "corpus", config, languages=LANGUAGES)
        for tokens in (round(float(text)) for text in options.tokens.split(",")):
            budget = replace(config, experts=replace(config.experts, tokens=tokens))
            scores = {}
            for system in systems:
                run = train_system(base, budget, system, rates, 0, f"{system}-{tokens}")
                found = evaluated(run, corpus, routings_of(system)[:1])
                scores[system] = np.asarray(perplexities(found, system))
                rows.append(
                    {
                        "width": width,
                        "parameters": config.model.parameter_count,
                        "seed_tokens": config.seed.tokens,
                        "tokens": tokens,
                        "system": system,
                        "perplexity": float(scores[system].mean()),
                        "change": float(scores[system].mean() / scores["dense"].mean() - 1),
                        "better": int((scores[system] < scores["dense"]).sum()),
                        "by_language": dict(zip(LANGUAGES, scores[system].tolist())),
                    }
                )
                _write(out, {"format": 1, "rates": rates, "rows": rows})
    print((out / "sweep.md").read_text())


def _setting(text: str) -> tuple[float, int]:
    rate, batch = text.split(",")
    return float(rate), int(batch)


def _of_width(config: RunConfig, width: int) -> RunConfig:
    """The Llama shape at another width, heads of 32."""
    model = replace(
        config.model,
        width=width,
        feedforward_width=-(-width * 8 // 3 // 8) * 8,
        head_count=width // 32,
        key_head_count=width // 32,
        head_size=32,
    )
    return replace(config, model=model)


def _write(out: Path, results: dict) -> None:
    (out / "sweep.json").write_text(json.dumps(results, indent=2))
    lines = [
        "| width | parameters | seed tokens | tokens | system | perplexity | change | better |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        change = "" if row["system"] == "dense" else f"{row['change']:+.1%}"
        better = "" if row["system"] == "dense" else f"{row['better']} of {len(LANGUAGES)}"
        lines.append(
            f"| {row['width']} | {row['parameters']:,} | {row['seed_tokens']:,} | "
            f"{row['tokens']:,} | {row['system']} | {row['perplexity']:.2f} | {change} | {better} |"
        )
    (out / "sweep.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
