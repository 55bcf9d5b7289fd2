"""Speed of a training that has not begun, estimated from one layer of its model on this machine."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from xelm.models.config import ModelConfig
from xelm.models.parameters import bind, graph, shapes
from xelm.models.target import target_of
from xelm.training.flops import of_a_token
from xelm.training.loss import cross_entropy
from xelm.training.master_weights import split_weights
from xelm.training_config import DataConfig, RuntimeConfig, TrainConfig

_MOST_OPERATIONS = 2e10
"""Most operations in one measurement: a few tenths of a second on two CPU cores."""
_MOST_VOCABULARY = 2**15
"""Rows of the embedding and output matrices that are measured, to save memory."""
_SHORTEST = 16
"""Positions below which a row is not shortened."""
_REPEATS = 3


def estimated_rate(
    model: ModelConfig, config: TrainConfig, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Positions a second that one device of this machine is estimated to train, from the time of
    the forward and backward pass of one layer with embedding, output and loss.

    The layer has the model's own shapes and the configuration's dtype, rows and batch; large ones
    are measured on fewer rows, shorter rows and a smaller vocabulary. The rate of floating-point
    operations (`of_a_token`) is taken for that of the whole model. The optimiser, reading and
    saving are not counted. On a busy machine with two cores the estimate for the quickstart's seed
    was .9 times (.8 to 1.1) the rate of its own steps; products of the same matrices alone would
    have said 3.9 times (`benchmarks/rate.py`).

    clock: seconds, read before and after each pass.
    """
    runtime = config.runtime
    # The settings that a pass depends on.
    alike = TrainConfig(
        tokens=1,
        sequence_length=config.sequence_length,
        batch_size=max(1, config.batch_size // runtime.accumulation_steps),
        data=DataConfig(mask_share=config.data.mask_share),
        runtime=RuntimeConfig(dtype=runtime.dtype, rematerialise=runtime.rematerialise),
    )
    return measured_layer(model, alike, clock)


@functools.lru_cache(maxsize=64)
def measured_layer(model: ModelConfig, config: TrainConfig, clock: Callable[[], float]) -> float:
    """Rate of one device, as `estimated_rate`, measured once in a process for the same settings."""
    one = replace(
        model,
        layer_count=1,
        local_layers=tuple(layer for layer in model.local_layers if layer == 0),
        nope_layers=tuple(layer for layer in model.nope_layers if layer == 0),
        vocabulary_size=min(model.vocabulary_size, _MOST_VOCABULARY),
    )
    rows, length = _size(one, config)
    dtype = config.runtime.dtype
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes(one))
    parameters, _ = split_weights(zeros, dtype)
    tokens = jnp.zeros((rows, length), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    predicted = length if one.causal else max(1, round(length * config.data.mask_share))

    def loss(parameters):
        shape = graph(
            one, dtype, rematerialise=config.runtime.rematerialise, target=target_of(jax.devices())
        )
        network = bind(shape, parameters)
        hidden = network.hidden(tokens, positions, jnp.ones_like(tokens))
        states, head = network.output(hidden[:, :predicted])
        targets = tokens[:, :predicted]
        return cross_entropy(states, head, targets, jnp.ones(targets.shape))

    step = jax.jit(jax.value_and_grad(loss))
    jax.block_until_ready(step(parameters))  # compiles
    seconds = []
    for _ in range(_REPEATS):
        began = clock()
        jax.block_until_ready(step(parameters))
        seconds.append(clock() - began)
    operations = rows * length * of_a_token(one, length)
    per_second = operations / max(statistics.median(seconds), np.finfo(float).tiny)
    return per_second / of_a_token(model, config.sequence_length)


def _size(model: ModelConfig, config: TrainConfig) -> tuple[int, int]:
    """Number of rows, and their length, that are measured in place of a batch."""
    rows, length = config.batch_size, config.sequence_length
    while rows * length * of_a_token(model, length) > _MOST_OPERATIONS:
        if rows == 1 and length <= _SHORTEST:
            break
        rows, length = (rows // 2, length) if rows > 1 else (1, length // 2)
    return rows, length
