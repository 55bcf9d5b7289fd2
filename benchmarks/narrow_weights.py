"""Weights in bfloat16 and int8 beside float32: tokens a second, bytes, and perplexity by language.

    python benchmarks/narrow_weights.py [--shape 8x512] [--requests 1,32]
    python benchmarks/narrow_weights.py --run RUN --text DIR

The first form times a decoder with random weights, which generates after prompts of 64 tokens; the
dtypes take turns in every step. "Seconds" are medians; speeds are ratios of the processor time of
steps and, in brackets, of the clock's, which on a busy machine says little. "GB/s" are the bytes of
the weights by the fastest step. With `--run` the models of a RUN are evaluated on the text of a
directory with weights in each dtype (`xelm evaluate --dtype`), and nothing is saved.
"""

import argparse
import os
import statistics
import time
from typing import Any

import jax
import numpy as np
from decoders import decoder

from xelm.models.config import WEIGHTS_DTYPES

PROMPT, STEPS = 64, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="8x512", help="layers x width (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--requests", default="1,32")
    parser.add_argument("--run", metavar="RUN")
    parser.add_argument("--text", metavar="DIR", help="held-out text, with --run")
    options = parser.parse_args()
    if options.run:
        return _perplexities(options)
    _speeds(options)


def _speeds(options: argparse.Namespace) -> None:
    from xelm.models.narrow import stored_as
    from xelm.models.parameters import for_inference, fresh_parameters
    from xelm.process import keep_freed_memory

    keep_freed_memory()
    model = decoder(options.shape, options.vocabulary)
    exact = jax.tree.map(np.asarray, for_inference(fresh_parameters(model, 0)))
    weights = {dtype: jax.device_put(stored_as(exact, dtype)) for dtype in WEIGHTS_DTYPES}
    size = {dtype: sum(a.nbytes for a in jax.tree.leaves(weights[dtype])) for dtype in weights}
    print(
        f"{jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} cores; decoder "
        f"{options.shape}, vocabulary {options.vocabulary}, {model.parameter_count / 1e6:.0f} M "
        f"parameters; prompts of {PROMPT} tokens\n"
    )
    print("| requests | weights | MB | ms a token | GB/s | speed over float32 | prompts |")
    print("|---|---|---|---|---|---|---|")
    for requests in map(int, options.requests.split(",")):
        steps, prompts = _timed(model, weights, requests)
        for dtype in weights:
            print(
                f"| {requests} | {dtype} | {size[dtype] / 1e6:.0f} "
                f"| {1e3 * statistics.median(t for _, t in steps[dtype]):.2f} "
                f"| {size[dtype] / min(t for _, t in steps[dtype]) / 1e9:.1f} "
                f"| {_over(steps, dtype)} | {_over(prompts, dtype)} |",
                flush=True,
            )


Times = dict[str, list[tuple[float, float]]]
"""Seconds of the processor and of the clock, by dtype."""


def _over(times: Times, dtype: str) -> str:
    """How many times as fast as float32, by the processor's time and by the clock's."""
    processor, clock = (
        statistics.median(one[way] for one in times["float32"])
        / statistics.median(one[way] for one in times[dtype])
        for way in (0, 1)
    )
    return f"{processor:.2f} ({clock:.2f})"


def _timed(model: Any, weights: dict[str, Any], requests: int) -> tuple[Times, Times]:
    """Times of steps of one token for each request, and of reading their prompts."""
    from xelm.inference.decoder import Decoder

    draw = np.random.default_rng(0)
    readers = {d: Decoder(model, lambda own=own: own, d) for d, own in weights.items()}
    steps: Times = {dtype: [] for dtype in readers}
    prompts: Times = {dtype: [] for dtype in readers}
    growing: dict[str, list[Any]] = {}
    for _ in range(4):  # the first compiles
        for dtype, reader in readers.items():
            for text in growing.pop(dtype, []):
                reader.close(text)
            ids = draw.integers(4, model.vocabulary_size, (requests, PROMPT)).tolist()
            texts = [reader.open(own, PROMPT + 2 * STEPS) for own in ids]
            prompts[dtype].append(_seconds(reader, dict(zip(texts, ids))))
            growing[dtype] = texts
    for _ in range(STEPS + 2):
        for dtype, reader in readers.items():
            steps[dtype].append(_seconds(reader, {text: [7] for text in growing[dtype]}))
    return {d: t[2:] for d, t in steps.items()}, {d: t[1:] for d, t in prompts.items()}


def _seconds(reader: Any, unread: dict[Any, list[int]]) -> tuple[float, float]:
    begun = time.process_time(), time.perf_counter()
    reader.read(unread)
    jax.block_until_ready([text.block.logits for text in unread])
    return time.process_time() - begun[0], time.perf_counter() - begun[1]


def _perplexities(options: argparse.Namespace) -> None:
    from xelm.evaluation.options import EvaluationOptions
    from xelm.runs.evaluate import evaluate
    from xelm.runs.run import open_run

    found: dict[str, list[float]] = {}
    for dtype in WEIGHTS_DTYPES:
        chosen = EvaluationOptions(routings=("language",), calibration_tokens=0, dtype=dtype)
        results = evaluate(open_run(options.run), options.text, chosen, save=False)
        for row in results.rows:
            if row.system == "ensemble":
                found.setdefault(row.language, []).append(row.perplexity)
    print(f"perplexity of the language's expert\n\n| language | {' | '.join(WEIGHTS_DTYPES)} |")
    print(f"|---|{'---|' * len(WEIGHTS_DTYPES)}")
    for language, row in sorted(found.items()):
        cells = [f"{row[0]:.3f}", *(f"{one:.3f} ({one / row[0] - 1:+.2%})" for one in row[1:])]
        print(f"| {language} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
