"""Complete configurations by name. Vary one with `xelm.settings.vary` or `--set`."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from xelm.config import RunConfig
from xelm.models.config import ModelConfig
from xelm.training_config import (
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RuntimeConfig,
    TrainConfig,
)


def quickstart() -> RunConfig:
    """`xelm quickstart`: the embedded sample corpus on a CPU, within five minutes on two cores.
    Languages are sampled in proportion to their tokens: with more passes over the smallest, the
    model would overfit it."""
    seed = TrainConfig(
        tokens=960_000,
        sequence_length=128,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=3e-3),
        data=DataConfig(sampling_exponent=1.0),
    )
    # The best of those tried for experts and for dense: docs/log.md, 2026-11-21.
    rate = OptimizerConfig(learning_rate=8e-3)
    experts = replace(seed, batch_size=4, optimizer=rate, random_seed=1)
    return RunConfig(
        model=_llama(vocabulary_size=4096, width=64, layers=2, head_size=32, max_length=512),
        seed=seed,
        experts=experts,
        dense_learning_rate=1.6e-2,
        dense_batch_size=16,
        grow=_grown(experts, tokens=250_000, random_seed=2),
    )


def tiny() -> RunConfig:
    """About 2 M parameters for corpora of some 10 MB: `xelm init RUN --preset tiny --corpus DIR`,
    an hour on two CPU cores."""
    seed = TrainConfig(
        tokens=16_000_000,
        sequence_length=256,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=3e-3),
        data=DataConfig(sampling_exponent=0.0),
    )
    rate = OptimizerConfig(learning_rate=5e-4)
    experts = replace(seed, tokens=8_000_000, batch_size=4, optimizer=rate, random_seed=1)
    return RunConfig(
        model=_llama(vocabulary_size=8192, width=128, layers=5, head_size=32, max_length=1024),
        seed=seed,
        experts=experts,
        dense_learning_rate=5e-4,
        dense_batch_size=64,
        grow=_grown(experts, tokens=1_000_000, random_seed=2),
    )


def small() -> RunConfig:
    """About 58 M parameters for corpora of some GB on one GPU:
    `xelm init RUN --preset small --corpus DIR`."""
    seed = TrainConfig(
        tokens=2_000_000_000,
        sequence_length=1024,
        batch_size=64,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        runtime=RuntimeConfig(dtype="bfloat16", checkpoint_every=500),
    )
    rate = OptimizerConfig(learning_rate=5e-4)
    experts = replace(seed, tokens=1_000_000_000, optimizer=rate, random_seed=1)
    return RunConfig(
        model=_llama(vocabulary_size=64_000, width=512, layers=8, head_size=64, max_length=2048),
        seed=seed,
        experts=experts,
        dense_learning_rate=5e-4,
        dense_batch_size=64,
        grow=_grown(experts, tokens=100_000_000, random_seed=2),
    )


def hub() -> RunConfig:
    """For a seed from the Hugging Face Hub on one GPU:
    `xelm init RUN --seed HF_DIR --preset hub --corpus DIR`. The learning rate is of the size usual
    for continued pre-training."""
    train = TrainConfig(
        tokens=1_000_000_000,
        sequence_length=1024,
        batch_size=32,
        optimizer=OptimizerConfig(learning_rate=1e-4),
        runtime=RuntimeConfig(
            dtype="bfloat16", accumulation_steps=4, rematerialise=True, checkpoint_every=500
        ),
    )
    return RunConfig(
        model=None,
        seed=train,
        experts=train,
        dense_learning_rate=1e-4,
        dense_batch_size=32,
        grow=_grown(train, tokens=100_000_000, random_seed=1),
    )


PRESETS: Mapping[str, Callable[[], RunConfig]] = {
    "quickstart": quickstart,
    "tiny": tiny,
    "small": small,
    "hub": hub,
}


def _grown(experts: TrainConfig, *, tokens: int, random_seed: int) -> TrainConfig:
    """Settings of a grown expert. Its text may be little, so that its training ends when more of it
    helps no longer; trainings at equal compute go on to the end."""
    patience = EvaluationConfig(patience=3)
    return replace(experts, tokens=tokens, random_seed=random_seed, evaluation=patience)


def _llama(
    *, vocabulary_size: int, width: int, layers: int, head_size: int, max_length: int
) -> ModelConfig:
    """The Llama shape; the feed-forward is 8/3 of the width, in multiples of 8, as in Llama."""
    return ModelConfig(
        vocabulary_size=vocabulary_size,
        width=width,
        feedforward_width=-(-width * 8 // 3 // 8) * 8,
        layer_count=layers,
        head_count=width // head_size,
        key_head_count=width // head_size,
        head_size=head_size,
        max_length=max_length,
    )
