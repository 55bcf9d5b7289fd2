"""What a long prompt costs the texts that are generated beside it: the time of each step of some
short texts alone, and of the same ones beside a prompt while it is read, while it is continued and
after it has left. The two take turns, step by step, so that other load slows both.

    python benchmarks/long_prompt.py
    python benchmarks/long_prompt.py --whole          # the prompt is read at once
    python benchmarks/long_prompt.py --pages          # caches in pages instead, attention alone
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decoders import decoder

from xelm.inference.engine import Engine
from xelm.inference.ensemble import Ensemble
from xelm.inference.reading import prompt_tokens_per_step
from xelm.inference.routers import uniform
from xelm.inference.running import GenerationRequest
from xelm.inference.sampling_params import SamplingParams
from xelm.models.parameters import for_inference, fresh_parameters


def main() -> None:
    parser = argparse.ArgumentParser(description="what a long prompt costs the texts beside it")
    parser.add_argument("--shape", default="4x256", help="layers x width (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=4_000)
    parser.add_argument("--experts", type=int, default=1, help="all of them read every text")
    parser.add_argument("--texts", type=int, default=31, help="number of short texts")
    parser.add_argument("--short", type=int, default=40, help="tokens of a short prompt")
    parser.add_argument("--prompt", type=int, default=6_000, help="tokens of the long prompt")
    parser.add_argument("--budget", type=int, help="tokens of prompts read in a step")
    parser.add_argument("--steps", type=int, default=50, help="steps beside it and after it")
    parser.add_argument("--rounds", type=int, default=3, help="after one that compiles")
    parser.add_argument("--whole", action="store_true", help="read the long prompt at once")
    parser.add_argument("--pages", action="store_true", help="time attention over pages instead")
    options = parser.parse_args()
    if options.pages:
        return _pages()
    pool, found = _pool(options), []
    for _ in range(options.rounds + 1):
        found.append(_round(options, pool))
    print(
        f"{options.texts} texts of {options.short} tokens and one of {options.prompt}; decoder "
        f"{options.shape}, {pool.model.parameter_count / 1e6:.1f} M parameters, "
        f"{options.experts} experts; medians of {options.rounds} rounds\n"
    )
    print("| steps | ms, p50 | p99 | alone, p50 | p99 | p50 over alone | p99 over alone |")
    print("|---|---|---|---|---|---|---|")
    for phase in found[0]:
        rows = [_summary(*one[phase]) for one in found[1:]]
        print("| " + " | ".join([phase, *(f"{x:.1f}" for x in np.median(rows, axis=0))]) + " |")
    print(f"\nsteps until the prompt was read: {len(found[-1]['reading it'][0])}")


def _pool(options: argparse.Namespace) -> Ensemble:
    model = decoder(options.shape, options.vocabulary, 2 * options.prompt)
    experts = [
        jax.device_put(for_inference(fresh_parameters(model, seed)))
        for seed in range(options.experts)
    ]
    return Ensemble(
        names=[str(number) for number in range(options.experts)],
        model=model,
        parameters=experts,
        router=uniform(options.experts),
        tokenizer=_Ids(),  # pyright: ignore[reportArgumentType]
    )


class _Ids:
    """In the place of a tokenizer: nothing ends a text."""

    end_ids = frozenset()

    def starts(self, ids):
        return 1


def _round(options: argparse.Namespace, pool: Ensemble) -> dict[str, tuple[list, list]]:
    """Seconds of steps with the long text and of steps without, by phase."""
    budget = None if options.whole else options.budget or prompt_tokens_per_step()
    draw = np.random.default_rng(0)

    def request(tokens: int, number: int) -> GenerationRequest:
        ids = draw.integers(4, pool.model.vocabulary_size, tokens).tolist()
        sampling = SamplingParams(max_new_tokens=options.prompt, temperature=0.0)
        return GenerationRequest(ids=ids, sampling=sampling, number=number)

    short = [request(options.short, number) for number in range(options.texts)]
    with_it, alone = (Engine(pool, prompt_tokens=budget) for _ in range(2))
    for engine in (with_it, alone):
        for one in short:
            engine.add(one)
        for _ in range(3):
            engine.step()

    def steps(wanted: Callable[[list], bool]) -> tuple[list, list]:
        found: tuple[list, list] = [], []
        while wanted(found[0]):
            for times, engine in zip(found, (with_it, alone)):
                begun = time.perf_counter()
                engine.step()
                times.append(time.perf_counter() - begun)
        return found

    def some(times: list) -> bool:
        return len(times) < options.steps

    phases = {"before it": steps(some)}
    long = with_it.add(request(options.prompt, options.texts))
    phases["reading it"] = steps(lambda times: not long.new_tokens)
    phases["beside it"] = steps(some)
    with_it.remove(long)
    phases["after it"] = steps(some)
    return phases


def _summary(with_it: list, alone: list) -> list[float]:
    ours, theirs = (np.percentile(times, (50, 99)) for times in (with_it, alone))
    return [*(1e3 * ours), *(1e3 * theirs), *(ours / theirs)]


def _pages() -> None:
    """Times attention of one token of 32 texts over 1,024 slots that lie in rows, and in pages."""
    rows, heads, slots, size, page, layers = 32, 8, 1024, 64, 64, 4
    keys = jax.random.split(jax.random.key(0), 2 * layers)
    whole = [jax.random.normal(key, (rows, heads, slots, size)) for key in keys]
    pages = [x.reshape(rows, heads, -1, page, size).swapaxes(1, 2) for x in whole]
    pages = [x.reshape(-1, heads, page, size) for x in pages]
    table = jnp.arange(rows * slots // page).reshape(rows, -1)
    query = jnp.ones((rows, heads, 1, size))

    def attention(query: Any, key: Any, value: Any) -> Any:
        weights = jax.nn.softmax(jnp.einsum("RKTH,RKSH->RKTS", query, key))
        return jnp.einsum("RKTS,RKSH->RKTH", weights, value)

    def gathered(array: Any, table: Any) -> Any:
        return array[table].swapaxes(1, 2).reshape(rows, heads, slots, size)

    @jax.jit
    def over_rows(query, caches):
        pairs = zip(caches[::2], caches[1::2])
        return functools.reduce(lambda x, pair: attention(x, *pair), pairs, query)

    @jax.jit
    def over_pages(query, caches, table):
        caches = [gathered(cache, table) for cache in caches]
        pairs = zip(caches[::2], caches[1::2])
        return functools.reduce(lambda x, pair: attention(x, *pair), pairs, query)

    times: dict[str, list[float]] = {"rows": [], "pages": []}
    for _ in range(10):
        for name, run in (
            ("rows", lambda: over_rows(query, whole)),
            ("pages", lambda: over_pages(query, pages, table)),
        ):
            begun = time.perf_counter()
            run().block_until_ready()
            times[name].append(time.perf_counter() - begun)
    ratio = np.median(np.divide(times["pages"], times["rows"])[1:])
    print(
        f"attention over rows {1e3 * np.median(times['rows']):.1f} ms, over pages "
        f"{1e3 * np.median(times['pages']):.1f} ms: {ratio:.1f} times"
    )


if __name__ == "__main__":
    main()
