"""A training of seconds: model, settings, text, and what tests ask of its results."""

import jax
import numpy as np

from xelm.data.rows import LanguageShare
from xelm.data.store import TokenizedLanguage, shuffled
from xelm.data.text_format import TextFormat
from xelm.models.config import ModelConfig
from xelm.training.metrics import MetricsLog
from xelm.training_config import OptimizerConfig, RuntimeConfig, TrainConfig

MODEL = ModelConfig(
    vocabulary_size=48,
    width=16,
    feedforward_width=24,
    layer_count=2,
    head_count=2,
    key_head_count=2,
    head_size=8,
    max_length=32,
)
CONFIG = TrainConfig(
    tokens=20 * 128,
    sequence_length=16,
    batch_size=8,
    optimizer=OptimizerConfig(learning_rate=3e-3),
    runtime=RuntimeConfig(checkpoint_every=6, log_every=1, mesh_data=1),
)
# Losses, on one CPU device; any change of these is a change of what is learned.
GOLDEN = [
    3.897463,
    3.841731,
    3.783886,
    3.745601,
    3.713678,
    3.67367,
    3.60691,
    3.60669,
    3.569696,
    3.520135,
    3.507457,
    3.48522,
    3.493701,
    3.467652,
    3.457733,
    3.443825,
    3.41035,
    3.434448,
    3.422287,
    3.418342,
]
TEXT = TextFormat(start_id=1, end_id=2)
SHARES = {"de": 0.5, "el": 0.3, "sw": 0.2}


def source(language: str, documents: int = 40, length: int = 23) -> LanguageShare:
    """Chains in which each token decides the next: 5 x + c modulo 40, c by language."""
    step = 3 + 2 * list(SHARES).index(language)
    draw = np.random.default_rng(step)
    found = []
    for first in draw.integers(0, 40, documents):
        chain = [int(first)]
        while len(chain) < length:
            chain.append((5 * chain[-1] + step) % 40)
        found += chain
    order, stream_ends = shuffled(language, np.full(documents, length))
    ids = TokenizedLanguage(
        language=language,
        ids=np.asarray(found, np.uint16) + 4,
        order=order,
        stream_ends=stream_ends,
        ends=np.arange(1, documents + 1) * length,
        bytes=np.full(documents, length),
        hashes=draw.integers(0, 2**63, (documents, 2)).astype(np.uint64),
    )
    return LanguageShare(ids=ids, share=SHARES[language])


SOURCES = [source(language) for language in SHARES]


def losses(metrics) -> list[float]:
    return [line["loss"] for line in metrics]


def assert_same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.parameters, other.parameters)
    assert (one.tokens, one.language_tokens) == (other.tokens, other.language_tokens)


def assert_same_lines(one, other):
    """All but how fast it went."""
    clocks = {"tokens_per_second": 0, "data_share": 0}
    assert [line | clocks for line in one] == [line | clocks for line in other]


class Interrupt(Exception):
    pass


def interrupt_at(monkeypatch, step: int):
    """The machine dies as the metrics of that step are to be written."""
    write = MetricsLog.write

    def fail(self, line):
        if line["step"] == step:
            raise Interrupt
        write(self, line)

    monkeypatch.setattr(MetricsLog, "write", fail)
