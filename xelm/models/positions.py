"""Positions of tokens as arrays: rotary angles, linear biases, sinusoids."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from xelm.models.config import Rope


def rope_frequencies(rope: Rope, head_size: int) -> Float[np.ndarray, " H2"]:
    """Radians by which each rotated pair of a head turns from one position to the next, float32."""
    head_size = rope.rotated(head_size)
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    frequencies = np.float32(1) / np.float32(rope.theta) ** exponents
    if rope.scaling == "none":
        return frequencies
    if rope.scaling == "longrope":
        return frequencies / np.asarray(rope.short_factors, np.float32)
    slow = frequencies / np.float32(rope.factor)
    if rope.scaling == "linear":
        return slow
    # Between the slowest and the fastest, the two are blended: with share 1 nothing is divided.
    if rope.scaling == "llama3":
        assert rope.original_length is not None  # Rope checks it
        turns = rope.original_length * frequencies / (2 * math.pi)
        share = (turns - rope.slowest) / (rope.fastest - rope.slowest)
    else:
        first, last = (_dimension(rope, head_size, turns) for turns in (rope.fastest, rope.slowest))
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_size - 1)
        width = last - first or 0.001  # as in the paper's code: no division by nothing
        share = 1 - (np.arange(head_size // 2, dtype=np.float32) - first) / width
    share = np.clip(share, 0, 1).astype(np.float32)
    return slow * (1 - share) + frequencies * share


def _dimension(rope: Rope, head_size: int, turns: float) -> float:
    """The pair of a head with so many turns over the original length; Peng et al. 2023, eq. 17."""
    assert rope.original_length is not None  # Rope checks it
    wavelength = rope.original_length / (turns * 2 * math.pi)
    return head_size * math.log(wavelength) / (2 * math.log(rope.theta))


def rope_angles(
    positions: Int[Array, "B T"], rope: Rope, head_size: int
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Cosines and sines of the rotary angles, in float32: bf16 confuses positions beyond 256."""
    frequencies = jnp.asarray(rope_frequencies(rope, head_size))
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles) * rope.amplitude, jnp.sin(angles) * rope.amplitude


def rotate(
    x: Float[Array, "B T N H"],
    cos: Float[Array, "B T H2"],
    sin: Float[Array, "B T H2"],
    *,
    interleaved: bool = False,
) -> Float[Array, "B T N H"]:
    """Queries or keys, the halves of each head turned by their position's angle (as in Llama).
    With fewer angles than half the head, only its first values are. interleaved: neighbours are
    turned instead (as in GPT-J)."""
    rotated = 2 * cos.shape[-1]
    h = x[..., :rotated].astype(jnp.float32)
    if interleaved:
        first, second = h[..., ::2], h[..., 1::2]
    else:
        first, second = jnp.split(h, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    pairs = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        turned = jnp.stack(pairs, axis=-1).reshape(h.shape).astype(x.dtype)
    else:
        turned = jnp.concatenate(pairs, axis=-1).astype(x.dtype)
    if rotated == x.shape[-1]:
        return turned
    return jnp.concatenate([turned, x[..., rotated:]], axis=-1)


def alibi_slopes(head_count: int) -> Float[np.ndarray, " N"]:
    """Slopes of linear biases, one a head: a geometric series (Press et al. 2022, section 3).
    If the number of heads is no power of two, every second slope of the next longer series is
    added, as in the authors' code."""
    whole = 2 ** int(math.log2(head_count))
    slopes = 2.0 ** (-8 / whole * np.arange(1, whole + 1))
    between = 2.0 ** (-4 / whole * np.arange(1, 2 * (head_count - whole) + 1, 2))
    return np.concatenate([slopes, between]).astype(np.float32)


def sinusoidal(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Fixed position vectors as in tensor2tensor and XGLM: sines, then cosines, of width / 2
    frequencies that fall geometrically from 1 to 1/10000; an odd width ends in a zero."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10_000.0) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.concatenate(
        [jnp.sin(angles), jnp.cos(angles), jnp.zeros((*positions.shape, width % 2))], axis=-1
    )
