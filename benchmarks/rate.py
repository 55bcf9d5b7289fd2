"""The estimate of a training's speed before it starts, beside the speed of its own steps.

    python benchmarks/rate.py [--rounds 5]

Both take turns in one process, so that whatever else the machine does slows both: a ratio is of
times measured next to each other. The trainings are the quickstart's, on random tokens. The other
estimate is made from products of matrices of the model's own shapes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from xelm.models.config import ModelConfig
from xelm.models.parameters import fresh_parameters
from xelm.presets import quickstart
from xelm.process import prepare
from xelm.settings import vary
from xelm.training.compiled import compile_steps
from xelm.training.expert_axis import stack
from xelm.training.flops import of_a_token
from xelm.training.rate import estimated_rate, measured_layer
from xelm.training.sharding import make_mesh
from xelm.training_config import TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    prepare()
    config = quickstart()
    assert config.model is not None
    print("| | tokens/s | one layer over it | products over it |\n|---|---|---|---|")
    for name, part in (("seed", config.seed), ("experts", config.experts)):
        real, layer, products = [], [], []
        step = _step(config.model, vary(part, {"runtime.mesh_data": 1}))
        for _ in range(rounds):
            real.append(part.tokens_per_step / _seconds(step, 20))
            measured_layer.cache_clear()
            layer.append(estimated_rate(config.model, part) / real[-1])
            products.append(_products(config.model, part) / real[-1])
        cells = [
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
            for ratios in (layer, products)
        ]
        print(f"| {name} | {statistics.median(real):,.0f} | {' | '.join(cells)} |", flush=True)


def _seconds(run: Callable[[], jax.Array], times: int) -> float:
    """Mean time of a call in seconds, after one that compiles."""
    jax.block_until_ready(run())
    began = time.perf_counter()
    for _ in range(times):
        last = run()
    jax.block_until_ready(last)
    return (time.perf_counter() - began) / times


def _step(model: ModelConfig, config: TrainConfig) -> Callable[[], jax.Array]:
    mesh = make_mesh(config)
    jax.set_mesh(mesh)
    functions = compile_steps(model, config, mesh)
    state = stack([functions.create[0](fresh_parameters(model, 0))], functions.state)
    shape = config.batch_size, config.sequence_length + 1
    tokens = np.random.default_rng(0).integers(4, model.vocabulary_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = {"tokens": tokens, "segments": np.ones_like(tokens), "positions": positions}
    batch = jax.device_put(batch, functions.batch_sharding)

    def step() -> jax.Array:
        nonlocal state
        state, metrics = functions.step(state, batch, np.array([1e-3], np.float32))
        return metrics.loss

    return step


def _products(model: ModelConfig, config: TrainConfig) -> float:
    """Positions a second at the rate of products of the model's shapes."""
    width, ffn, layers = model.width, model.feedforward_width, model.layer_count
    heads, keys = (n * model.head_size for n in (model.head_count, model.key_head_count))
    shapes = [(width, heads), (width, keys), (width, keys), (heads, width)]
    shapes += [(width, ffn)] * (1 + model.gated) + [(ffn, width)]
    product, rows = jax.jit(jnp.matmul), config.tokens_per_step
    seconds = operations = 0.0
    for inputs, outputs in [*shapes * layers, (width, model.vocabulary_size)]:
        x, matrix = jnp.ones((rows, inputs)), jnp.ones((inputs, outputs))
        seconds += _seconds(lambda x=x, matrix=matrix: product(x, matrix), 3)
        operations += 2 * rows * inputs * outputs
    return operations / seconds / of_a_token(model, config.sequence_length)


if __name__ == "__main__":
    main()
