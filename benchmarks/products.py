"""The products of matrices of a training step, in XLA and in PyTorch: what a step takes at least.

    python benchmarks/products.py [--shapes 4x256x256,4x256x1024] [--rounds 5]

Shapes are those of `benchmarks/train_step.py`. Each product is one compiled call, alone, float32 on
all cores. Both libraries take turns, a second apart, since threads of the one that has just run
wait for work for a while and would slow the other. A product's time is the least of all rounds; the
sum over a step counts each as often as a step makes it.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

_REPEATS = 8  # of a product, one after the other
_HEAD_SIZE, _BLOCKS, _CHUNK = 64, 8, 512


class _Product(NamedTuple):
    """An einsum of two arrays, and how often a step makes it."""

    name: str
    equation: str
    left: tuple[int, ...]
    right: tuple[int, ...]
    times: int

    @property
    def flops(self) -> float:
        letters = dict(zip(self.equation.split("->")[0].replace(",", ""), self.left + self.right))
        return 2.0 * math.prod(letters.values())


def _products(layers: int, width: int, length: int, vocabulary: int, tokens: int) -> list[_Product]:
    inner, heads = width * 8 // 3 // 64 * 64, tokens // length * width // _HEAD_SIZE
    found = []
    for name, rows, into, out, times in (
        ("queries, keys, values, outputs", tokens, width, width, 4 * layers),
        ("feed-forward, in", tokens, width, inner, 2 * layers),
        ("feed-forward, out", tokens, inner, width, layers),
        ("head", _CHUNK, width, vocabulary, tokens // _CHUNK),
    ):
        found += [
            _Product(name, "md,df->mf", (rows, into), (into, out), times),
            _Product(f"{name}: of inputs", "mf,df->md", (rows, out), (into, out), times),
            _Product(f"{name}: of weights", "md,mf->df", (rows, into), (rows, out), times),
        ]
    block = max(64, length // _BLOCKS)
    for keys in range(block, length + 1, block):
        queries = (heads, block, _HEAD_SIZE)
        scores = (heads, block, keys)
        values = (heads, keys, _HEAD_SIZE)
        # Forward; again on the way back; and the gradients of weights, which are such products too.
        found += [
            _Product("scores", "ith,ish->its", queries, values, 3 * layers),
            _Product("mixing", "its,ish->ith", scores, values, 2 * layers),
            _Product("keys and values", "ith,its->ihs", queries, scores, 2 * layers),
        ]
    return found


def _jax(product: _Product) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    left, right = jnp.ones(product.left), jnp.ones(product.right)
    call = jax.jit(lambda a, b: jnp.einsum(product.equation, a, b))
    return lambda: call(left, right).block_until_ready()


def _torch(product: _Product) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    left, right = torch.ones(product.left), torch.ones(product.right)
    call = {
        "md,df->mf": lambda: left @ right,
        "mf,df->md": lambda: left @ right.mT,
        "md,mf->df": lambda: left.mT @ right,
        "ith,ish->its": lambda: left @ right.mT,
        "its,ish->ith": lambda: left @ right,
        "ith,its->ihs": lambda: left.mT @ right,
    }
    return call[product.equation]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default="4x256x256,4x256x1024", help="layers x width x length")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for shape in options.shapes.split(","):
        layers, width, length = map(int, shape.split("x"))
        products = _products(layers, width, length, options.vocabulary, options.tokens)
        _compare(shape, products, options.rounds)


def _compare(shape: str, products: list[_Product], rounds: int) -> None:
    least = {}
    for make in [_jax, _torch] * rounds:
        time.sleep(1)
        for product in products:
            call = make(product)
            call()
            for _ in range(_REPEATS):
                started = time.perf_counter()
                call()
                seconds = time.perf_counter() - started
                least[make, product] = min(seconds, least.get((make, product), math.inf))
    print(f"\n{shape}\n\n| GFLOP/s | of a step | XLA | torch |\n|---|---|---|---|")
    names = list(dict.fromkeys(product.name for product in products))
    for name in [*names, "all"]:
        group = [product for product in products if name in (product.name, "all")]
        work = sum(product.flops * product.times for product in group)
        rates = [
            work / sum(least[make, product] * product.times for product in group)
            for make in (_jax, _torch)
        ]
        print(f"| {name} | {work / 1e9:,.1f} GFLOP |", *(f"{rate / 1e9:,.0f} |" for rate in rates))
    both = [
        sum(least[make, product] * product.times for product in products) for make in (_jax, _torch)
    ]
    print(
        "\nAll products of a step take at least {:.2f} s in XLA, {:.2f} s in torch.".format(*both)
    )


if __name__ == "__main__":
    main()
