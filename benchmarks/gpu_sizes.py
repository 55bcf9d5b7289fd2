"""How large the problems of `benchmarks/gpu.py` are, and what its parts yield."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import memory

from xelm.models.config import ModelConfig
from xelm.models.families import model_config

Row = dict[str, Any]
"""Figures by their names, which have units: seconds, bytes, flops (operations)."""
Rows = Iterator[Row]


class Sizes(NamedTuple):
    """How large the problems are."""

    length: int
    """Tokens of a row in training."""
    rows: tuple[tuple[int, bool], ...]
    """Rows of a batch, and whether layers are rematerialised, until one fits the memory."""
    prompt: int
    new: int
    """Tokens of a prompt and new ones in generation."""
    warm_up: int
    steps: int
    """Training steps before and in a measurement."""
    attention: tuple[int, int, int, int]
    """Batch, tokens, heads and their size."""
    model: Callable[[str], ModelConfig]


def _model(name: str) -> ModelConfig:
    return model_config(memory.CONFIGS[name])


def _tiny_model(name: str) -> ModelConfig:
    model = _model(name)
    groups = model.head_count // model.key_head_count
    return replace(
        model,
        **{"vocabulary_size": 512, "width": 128, "feedforward_width": 256, "layer_count": 2},
        **{"head_count": 4, "key_head_count": 4 // groups, "head_size": 32},
    )


FULL = Sizes(
    length=2048,
    rows=((8, False), (8, True), (4, True), (1, True)),
    prompt=64,
    new=64,
    warm_up=3,
    steps=5,
    attention=(8, 2048, 16, 128),
    model=_model,
)
"""Those of a GPU with 24 GB or more."""
TINY = Sizes(
    length=128,
    rows=((2, False),),
    prompt=16,
    new=8,
    warm_up=1,
    steps=2,
    attention=(2, 256, 4, 64),
    model=_tiny_model,
)
"""Those that show on a CPU that all runs."""
