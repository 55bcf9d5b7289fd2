"""Operations of training: counted from masks, and the peaks of devices by their names."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from xelm.models.config import ModelConfig
from xelm.training.flops import of_a_token, peak, peak_of

MODEL = ModelConfig(
    vocabulary_size=100,
    width=16,
    feedforward_width=24,
    layer_count=3,
    head_count=2,
    key_head_count=1,
    head_size=8,
    max_length=64,
)
PRODUCTS = 3 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24) + 100 * 16


def seen(length, window, causal):
    """Scores of a layer, by its mask."""
    apart = np.subtract.outer(np.arange(length), np.arange(length))
    return ((abs(apart) < window) & ((apart >= 0) | (not causal))).sum()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_of_products_and_of_what_masks_let_through(causal, tied):
    model = replace(MODEL, causal=causal, tie_embeddings=tied, local_window=5, local_layers=(0, 2))
    norms = 7 * 16  # counted as if they were products: there are few
    scores = 2 * seen(32, 5, causal) + seen(32, 32, causal)
    # Two products of two operations a value, each thrice: forward, and both ways back.
    wanted = 6 * (PRODUCTS + norms) + 3 * 2 * 2 * 16 * scores / 32
    assert of_a_token(model, 32) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("TPU v5 lite", 197e12),
        ("TPU v4", 275e12),
        ("NVIDIA GB200", None),
        ("cpu", None),
    ],
)
def test_peaks_are_of_whole_names(monkeypatch, name, wanted):
    class Device:
        device_kind = name

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert peak("bfloat16", 4) == (None if wanted is None else 4 * wanted)
    assert peak("float32", 4) is None


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("NVIDIA A100-SXM4-40GB", 1555e9),
        ("NVIDIA A100-SXM4-80GB", 2039e9),
        ("NVIDIA A100 80GB PCIe", 1935e9),
        ("NVIDIA H200", 4800e9),
        ("NVIDIA H100 80GB HBM3", 3350e9),
        ("NVIDIA GeForce RTX 4090", 1008e9),
    ],
)
def test_bandwidths_of_memory_are_of_whole_names(name, wanted):
    known = peak_of(name)
    assert known is not None and known.bandwidth == wanted
