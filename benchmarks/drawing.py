"""What drawing a token costs beside taking the likeliest one: the time of a step of generation
under several sampling parameters, over that of greedy steps, which take turns with it.

    python benchmarks/drawing.py [--shape 2x64] [--vocabularies 32000,262144] [--rows 1,16]
        [--scale 1,8]

The models are random; `--scale` multiplies their logits, so that predictions are about even (1) or
peaked. Of an even one top_p keeps most of the vocabulary, which takes longest.
"""

import argparse
import time
from dataclasses import replace

import jax
import numpy as np

from xelm.inference.engine import Engine
from xelm.inference.ensemble import Ensemble
from xelm.inference.routers import uniform
from xelm.inference.running import GenerationRequest
from xelm.inference.sampling_params import GREEDY, SamplingParams
from xelm.models.config import ModelConfig
from xelm.models.parameters import for_inference, fresh_parameters

WAYS = {
    "temperature .8": SamplingParams(temperature=0.8, top_p=1.0),
    "and top_p .95": SamplingParams(temperature=0.8, top_p=0.95),
    "and top_k 50": SamplingParams(temperature=0.8, top_k=50, top_p=1.0),
    "and both": SamplingParams(temperature=0.8, top_k=50, top_p=0.95),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="what drawing costs beside the likeliest token")
    parser.add_argument("--shape", default="2x64", help="layers x width (default: %(default)s)")
    parser.add_argument("--vocabularies", default="32000,262144")
    parser.add_argument("--rows", default="1,16", help="numbers of texts")
    parser.add_argument("--scale", default="1,8", help="factors of the logits")
    parser.add_argument(
        "--steps", type=int, default=30, help="of each kind, after two that compile"
    )
    options = parser.parse_args()
    print("| vocabulary | texts | scale | greedy step, ms | " + " | ".join(WAYS) + " |")
    print("|---|---|---|---|" + "---|" * len(WAYS))
    for vocabulary in map(int, options.vocabularies.split(",")):
        for scale in map(float, options.scale.split(",")):
            pool = _pool(options.shape, vocabulary, scale)
            for rows in map(int, options.rows.split(",")):
                greedy, *ratios = _times(pool, rows, options.steps)
                cells = [f"{vocabulary:,}", str(rows), f"{scale:g}", f"{1000 * greedy:.2f}"]
                print("| " + " | ".join([*cells, *(f"{x:.2f}" for x in ratios)]) + " |", flush=True)


def _times(pool: Ensemble, rows: int, steps: int) -> list[float]:
    """Median time of a greedy step, and the medians of the others over it."""
    engine = Engine(pool)
    prompt = np.random.default_rng(0).integers(4, pool.model.vocabulary_size, 8).tolist()
    running = [
        engine.add(GenerationRequest(ids=prompt, sampling=GREEDY, number=number))
        for number in range(rows)
    ]
    ways = [GREEDY, *WAYS.values()]
    found = np.zeros((steps + 2, len(ways)))
    for step in range(steps + 2):
        for column, way in enumerate(ways):
            for sequence in running:
                sequence.request = replace(sequence.request, sampling=way)
            begun = time.perf_counter()
            engine.step()
            found[step, column] = time.perf_counter() - begun
    found = found[2:]
    ratios = np.median(found[:, 1:] / found[:, :1], axis=0)
    return [float(np.median(found[:, 0])), *ratios.tolist()]


def _pool(shape: str, vocabulary: int, scale: float) -> Ensemble:
    layers, width = map(int, shape.split("x"))
    model = ModelConfig(
        vocabulary_size=vocabulary,
        width=width,
        feedforward_width=2 * width,
        layer_count=layers,
        head_count=2,
        key_head_count=2,
        head_size=width // 2,
        max_length=1024,
        logit_scale=scale,
    )
    return Ensemble(
        names=["model"],
        model=model,
        parameters=[jax.device_put(for_inference(fresh_parameters(model, 0)))],
        router=uniform(1),
        tokenizer=_Ids(),  # pyright: ignore[reportArgumentType]
    )


class _Ids:
    """In the place of a tokenizer: nothing ends a text."""

    end_ids = frozenset()

    def starts(self, ids):
        return 1


if __name__ == "__main__":
    main()
