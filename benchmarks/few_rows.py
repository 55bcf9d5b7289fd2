"""Products of a few rows with large matrices on a CPU: which side the matrix is on.

    python benchmarks/few_rows.py

Each of 24 matrices of 1024 x 4096 is multiplied with the same rows, as in decoding: reading them
takes the time. Ways: x @ W with W as [inputs, outputs], as training has it; x @ W.T with W as
[outputs, inputs]; the same as `xelm.models.products` has it. Medians of GB/s, in turns.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from xelm.models.products import by_rows_of

INPUTS, OUTPUTS, COUNT, ROUNDS = 1024, 4096, 24, 7


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    key = jax.random.key(0)
    turned = list(jax.random.normal(key, (COUNT, OUTPUTS, INPUTS)))
    plain = [jnp.array(matrix.T) for matrix in turned]
    ways: dict[str, tuple[Any, list]] = {
        "x @ W": (lambda x, matrix: x @ matrix, plain),
        "x @ W.T": (lambda x, matrix: jnp.einsum("MI,OI->MO", x, matrix), turned),
        "products": (by_rows_of, turned),
    }
    print(f"| rows | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}")
    for count in (1, 2, 4, 8, 16, 32, 64, 128):
        rows = jax.random.normal(key, (count, INPUTS))
        runs = {name: _compiled(way, rows, matrices) for name, (way, matrices) in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                begun = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begun)
        size = COUNT * turned[0].nbytes / 1e9
        found = (f"{size / statistics.median(times):.1f}" for times in seconds.values())
        print(f"| {count} | {' | '.join(found)} |", flush=True)


def _compiled(way: Any, rows: Any, matrices: list) -> Any:
    """Other rows for each matrix, so that none of the products is another's."""

    @jax.jit
    def run(rows, matrices):
        return sum(way(rows * (1.0 + n), matrix) for n, matrix in enumerate(matrices))

    run(rows, matrices).block_until_ready()
    return lambda: run(rows, matrices).block_until_ready()


if __name__ == "__main__":
    main()
