"""Floating-point operations of training, and the peak of known devices."""

import re

import jax

from xelm.models.config import ModelConfig

PEAKS = {
    **{"A100": 312e12, "L4": 121e12, "L40": 181e12, "L40S": 362e12},
    **{"H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12, "B200": 2250e12},
    **{"TPU v4": 275e12, "TPU v4 lite": 138e12, "TPU v5": 459e12, "TPU v5p": 459e12},
    **{"TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12},
}
"""Words of a device's name -> FLOP/s of dense bfloat16 products, by its maker's data sheet."""


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


def peak(dtype: str, devices: int) -> float | None:
    """Peak FLOP/s of matrix products on `devices` devices together; None where it is unknown: on
    CPUs, and for float32, which devices compute in several ways."""
    if dtype != "bfloat16":
        return None
    kind = jax.devices()[0].device_kind
    names = [name for name in PEAKS if re.search(rf"\b{name}\b", kind)]
    return PEAKS[max(names, key=len)] * devices if names else None
