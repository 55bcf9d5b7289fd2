"""How long a billion tokens take, by arithmetic: the table of docs/training.md.

    python benchmarks/budget.py

Operations a token are those of `xelm/training/flops.py` at length 2,048; peaks are of the makers'
data sheets; the share of the peak that is reached is assumed, not measured.
"""

import argparse

from memory import CONFIGS

from xelm.models.families import model_config
from xelm.training.flops import PEAKS, of_a_token

NAMES = ("XGLM 564M", "Qwen 3 0.6B", "XGLM 1.7B", "Mistral 7B", "XGLM 7.5B")
MACHINES = {"L4": (PEAKS["L4"].flops, 1), "v5e-16": (PEAKS["TPU v5e"].flops, 16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--share", type=float, default=0.3, help="of the peak")
    share = parser.parse_args().share
    for name in NAMES:
        flops = of_a_token(model_config(CONFIGS[name]), 2048)
        hours = [1e9 * flops / (share * peak * count) / 3600 for peak, count in MACHINES.values()]
        print(f"| {name} | {flops / 1e9:.1f} | {' | '.join(f'{h:,.1f} h' for h in hours)} |")


if __name__ == "__main__":
    main()
