"""Where the gain of experts over a dense model begins and how it grows: over width and tokens.

    python benchmarks/sweep.py --data DATA --out OUT --widths 64,128 --tokens 5e5,1e6,2e6

For each width one seed is trained; dense and typological pairs (k=8) continue it at each budget,
with the same peak rate and rows a step given on the command line for each side. Prints mean
perplexities over the sixteen languages and the change. The command can be killed and run again.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from systems import LANGUAGES, evaluated, halves, perplexities, train_system

from xelm.cli import prepare
from xelm.config import RunConfig, override
from xelm.presets import tiny
from xelm.runs.init import init

EXPERTS = "typology-k8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--widths", default="64,128", help="of the residual stream")
    parser.add_argument("--tokens", default="5e5,1e6,2e6", help="of each system")
    parser.add_argument("--dense", default="1e-3,16", help="peak rate and rows a step of dense")
    parser.add_argument("--experts", default="1e-3,4", help="the same of the experts")
    parser.add_argument("--max-documents", type=int, default=40)
    parser.add_argument("--set", dest="settings", action="append", default=[])
    options = parser.parse_args()
    prepare()
    data, out = Path(options.data), Path(options.out)
    corpus = halves(data, out, options.max_documents)["test"]
    rates = {kind: _setting(getattr(options, kind)) for kind in ("dense", "experts")}
    rows = []
    for width in map(int, options.widths.split(",")):
        config = _of_width(override(tiny(), options.settings), width)
        folder = out / f"width-{width}"
        base = init(folder / "base", data / "corpus", config, languages=LANGUAGES)
        for tokens in (round(float(text)) for text in options.tokens.split(",")):
            budget = replace(config, experts=replace(config.experts, tokens=tokens))
            found = {}
            for system in ("dense", EXPERTS):
                run = train_system(base, budget, system, rates, 0, f"{system}-{tokens}")
                found[system] = np.asarray(perplexities(evaluated(run, corpus, system), system))
            rows.append(
                {
                    "width": width,
                    "parameters": config.model.parameter_count,
                    "seed_tokens": config.seed.tokens,
                    "tokens": tokens,
                    "dense": float(found["dense"].mean()),
                    "experts": float(found[EXPERTS].mean()),
                    "better": int((found[EXPERTS] < found["dense"]).sum()),
                }
            )
            (out / "sweep.json").write_text(json.dumps({"format": 1, "rows": rows}, indent=2))
            _print(rows)


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


def _print(rows: list[dict]) -> None:
    print("| width | parameters | seed tokens | tokens | dense | experts | change | better |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['width']} | {row['parameters']:,} | {row['seed_tokens']:,} | "
            f"{row['tokens']:,} | {row['dense']:.2f} | {row['experts']:.2f} | "
            f"{row['experts'] / row['dense'] - 1:+.1%} | {row['better']} of {len(LANGUAGES)} |"
        )


if __name__ == "__main__":
    main()
