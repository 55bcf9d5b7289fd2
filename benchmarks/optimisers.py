"""Losses that one model ends with, by optimiser, dtype of what is kept, and peak rate.

    python benchmarks/optimisers.py --run RUN --tokens 400000

A model of the shape of a RUN's seed is trained from nothing on all of the RUN's text, each time
with the same rows. The loss is the mean of the last tenth of the steps, in nats.
"""

import argparse
import functools
import itertools
import statistics
import tempfile
from pathlib import Path

from xelm.models.checkpoint import read_config
from xelm.models.parameters import fresh_parameters
from xelm.process import prepare
from xelm.runs.run import Run, open_run
from xelm.runs.shares import dense_text
from xelm.settings import vary
from xelm.training.loop import train
from xelm.training.metrics import read_metrics
from xelm.training.trainer import TrainingSpec

SETTINGS = {
    "adamw": {},
    "adamw, averages in bfloat16": {"runtime.moments_dtype": "bfloat16"},
    "adamw, all in bfloat16": {"runtime.dtype": "bfloat16", "runtime.moments_dtype": "bfloat16"},
    "adafactor": {"optimizer.name": "adafactor"},
    "adafactor, average in bfloat16": {
        "optimizer.name": "adafactor",
        "runtime.moments_dtype": "bfloat16",
    },
    "adafactor without an average": {"optimizer.name": "adafactor", "optimizer.beta1": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", required=True, help="a RUN whose seed was trained from nothing")
    parser.add_argument("--tokens", type=float, default=4e5)
    parser.add_argument("--rates", nargs="*", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    options = parser.parse_args()
    prepare()
    run = open_run(options.run)
    print(f"| | {' | '.join(f'{rate:g}' for rate in options.rates)} |")
    print("|---|" + "---|" * len(options.rates))
    found: dict[str, list[str]] = {}
    for name, rate in itertools.product(options.settings, options.rates):
        loss = _loss(run, int(options.tokens), SETTINGS[name] | {"optimizer.learning_rate": rate})
        found.setdefault(name, []).append(f"{loss:.3f}")
        if len(found[name]) == len(options.rates):
            print(f"| {name} | {' | '.join(found[name])} |", flush=True)


def _loss(run: Run, tokens: int, changes: dict) -> float:
    model = read_config(run.seed)
    config = vary(run.config.seed, {"tokens": tokens, "runtime.log_every": 1, **changes})
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingSpec(
            label="model",
            start=functools.partial(fresh_parameters, model, 0),
            sources=dense_text(run).sources,
            config=config,
            directory=Path(folder),
        )
        train(training, model, run.tokenizer().text_format)
        losses = [line["loss"] for line in read_metrics(Path(folder) / "metrics.jsonl")]
    return statistics.mean(losses[-max(1, len(losses) // 10) :])


if __name__ == "__main__":
    main()
