"""How often a training waits for its devices: the host reads results at steps that log, measure or
save, and at no other, so that it can prepare the next steps meanwhile."""

import jax
import numpy as np
from small_training import CONFIG, MODEL, SOURCES, TEXT

from xelm.models.parameters import fresh_parameters
from xelm.settings import vary
from xelm.training import loop
from xelm.training.trainer import TrainingSpec


class Result:
    """A result on a device that notes when the host reads it; nothing else can be done with it."""

    def __init__(self, array, reads: list[str], what: str):
        self._array, self._reads, self._what = array, reads, what

    def __array__(self, dtype=None, copy=None):
        self._reads.append(self._what)
        return np.asarray(self._array, dtype)


def reads_of_steps(tmp_path, monkeypatch, **changes) -> dict[int, set[str]]:
    """What the host read of the results of each step (0: before the first)."""
    reads: dict[int, list[str]] = {0: []}

    def compile_steps(*arguments):
        compiled = make(*arguments)

        def noted(function, what):
            return lambda *inputs: jax.tree.map(
                lambda array: Result(array, reads[max(reads)], what), function(*inputs)
            )

        def step(*inputs):
            reads[max(reads) + 1] = []
            state, metrics = compiled.step(*inputs)
            return state, jax.tree.map(lambda a: Result(a, reads[max(reads)], "metrics"), metrics)

        return compiled._replace(
            step=step,
            finite=noted(compiled.finite, "finite"),
            measure=noted(compiled.measure, "held-out"),
        )

    make = loop.compile_steps
    monkeypatch.setattr(loop, "compile_steps", compile_steps)
    spec = TrainingSpec(
        label="test",
        start=lambda shardings: jax.device_put(fresh_parameters(MODEL, 0), shardings),
        sources=SOURCES,
        held_out=SOURCES[:1],
        config=vary(CONFIG, changes),
        directory=tmp_path / "training",
    )
    loop.train(spec, MODEL, TEXT)
    return {step: set(what) for step, what in reads.items() if what}


def test_the_host_reads_results_only_to_log_measure_and_save(tmp_path, monkeypatch):
    found = reads_of_steps(
        tmp_path,
        monkeypatch,
        **{"runtime.log_every": 7, "runtime.checkpoint_every": 9, "evaluation.every": 10},
    )
    assert found == {
        0: {"held-out"},
        1: {"metrics"},  # which must be finite
        7: {"metrics"},
        9: {"metrics", "finite"},
        10: {"held-out", "finite"},  # better than all before, so it is saved
        14: {"metrics"},
        18: {"metrics", "finite"},
        20: {"metrics", "held-out", "finite"},
    }
