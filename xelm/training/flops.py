"""Floating-point operations of training, and the peaks of known devices."""

import re
from typing import NamedTuple

import jax

from xelm.models.config import ModelConfig


class Peak(NamedTuple):
    """What a device does at most, by its maker's data sheet."""

    flops: float
    """FLOP/s of dense bfloat16 products."""
    bandwidth: float
    """Bytes a second of its memory."""


PEAKS = {
    "A10": Peak(125e12, 600e9),
    "A100": Peak(312e12, 1555e9),
    "A100-SXM4-80GB": Peak(312e12, 2039e9),
    "A100 80GB PCIe": Peak(312e12, 1935e9),
    "L4": Peak(121e12, 300e9),
    "L40": Peak(181e12, 864e9),
    "L40S": Peak(362e12, 864e9),
    "RTX 4090": Peak(165e12, 1008e9),
    "H100": Peak(989e12, 3350e9),
    "H100 PCIe": Peak(756e12, 2000e9),
    "H100 NVL": Peak(835e12, 3900e9),
    "H200": Peak(989e12, 4800e9),
    "B200": Peak(2250e12, 8000e9),
    "TPU v4": Peak(275e12, 1228e9),
    "TPU v4 lite": Peak(138e12, 614e9),
    "TPU v5": Peak(459e12, 2765e9),
    "TPU v5p": Peak(459e12, 2765e9),
    "TPU v5 lite": Peak(197e12, 819e9),
    "TPU v5e": Peak(197e12, 819e9),
    "TPU v6 lite": Peak(918e12, 1640e9),
    "TPU v6e": Peak(918e12, 1640e9),
}
"""Words of a device's name -> its peak."""


def of_a_token(model: ModelConfig, length: int, trained: float = 1.0) -> float:
    """Operations for a position of a row of `length`, forward and backward: 6 for each parameter
    in a product, and 12 H S for each layer's attention, of H values in its heads and S keys that a
    query sees on average (Chowdhery et al. 2022, arXiv 2204.02311, appendix B, which has no mask).
    Rematerialised computations do not count; an encoder's head counts for all positions. trained:
    share of the parameters that are trained; the others take 4 operations."""
    tables = (model.position_rows + model.token_types) * model.width
    if not model.tie_embeddings:
        tables += model.vocabulary_size * model.width
    heads = model.head_count * model.head_size
    keys = sum(_keys(model, layer, length) for layer in range(model.layer_count))
    return (4.0 + 2.0 * trained) * (model.parameter_count - tables) + 12.0 * heads * keys


def _keys(model: ModelConfig, layer: int, length: int) -> float:
    """Number of keys that a query of a layer sees, on average over a row of one document."""
    window = length
    if layer in model.local_layers and model.local_window is not None:
        window = min(length, model.local_window)
    # Earlier ones and itself, fewer at the beginning; in encoders as many later ones.
    earlier = window - window * (window - 1) / (2 * length)
    return earlier if model.causal else 2 * earlier - 1


def peak_of(name: str) -> Peak | None:
    """The peak of a device by its name; None where it is unknown, as that of CPUs is."""
    names = [known for known in PEAKS if re.search(rf"\b{known}\b", name)]
    return PEAKS[max(names, key=len)] if names else None


def peak(dtype: str, devices: int) -> float | None:
    """Peak FLOP/s of matrix products on `devices` devices together; None where it is unknown: on
    CPUs, and for float32, which devices compute in several ways."""
    known = peak_of(jax.devices()[0].device_kind)
    return None if dtype != "bfloat16" or known is None else known.flops * devices
