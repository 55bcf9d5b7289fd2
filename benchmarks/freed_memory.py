"""What it is worth on a CPU that freed memory is kept (`xelm.process.keep_freed_memory`).

    python benchmarks/freed_memory.py

Steps of the preset `tiny`, in fresh processes of one core each, with and without, in turns. Prints
positions a second of each, seconds spent in the system, and the median of the ratios.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

from xelm.process import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="at least one")
    parser.add_argument("--kept", choices=("yes", "no"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kept:
        return _measure(options.kept == "yes", options.steps)
    ratios = []
    for number in range(options.rounds):
        found = {}
        for kept in ("yes", "no") if number % 2 else ("no", "yes"):
            command = [sys.executable, __file__, "--kept", kept, "--steps", str(options.steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            found[kept] = json.loads(done.stdout)
            rate, system = found[kept]["rate"], found[kept]["system"]
            print(f"kept {kept:3}  {rate:7,.0f} positions/s  {system:5.1f} s in the system")
        ratios.append(found["yes"]["rate"] / found["no"]["rate"])
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def _measure(kept: bool, steps: int) -> None:
    if kept:
        keep_freed_memory()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])

    import jax
    import numpy as np

    from xelm.models.parameters import fresh_parameters
    from xelm.presets import tiny
    from xelm.training.compiled import compile_steps
    from xelm.training.expert_axis import stack
    from xelm.training.sharding import make_mesh

    config, draw = tiny(), np.random.default_rng(0)
    model = config.model
    assert model is not None
    shape = (config.experts.batch_size, config.experts.sequence_length + 1)
    mesh = make_mesh(config.experts)
    with jax.set_mesh(mesh):
        functions = compile_steps(model, config.experts, mesh)
        state = functions.create[0](fresh_parameters(model, 0))
        state = stack([state], functions.state)
        for step in range(-5, steps):
            if step == 0:  # compiled, and warm
                began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
            batch = {
                "tokens": draw.integers(4, model.vocabulary_size, shape, np.int32),
                "segments": np.ones(shape, np.int32),
                "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
            }
            batch = jax.device_put(batch, functions.batch_sharding)
            state, metrics = functions.step(state, batch, np.array([1e-4]))
            metrics.loss.block_until_ready()
    seconds = time.perf_counter() - began
    system = resource.getrusage(resource.RUSAGE_SELF).ru_stime - before.ru_stime
    rate = steps * config.experts.tokens_per_step / seconds
    print(json.dumps({"rate": rate, "system": system}))


if __name__ == "__main__":
    main()
