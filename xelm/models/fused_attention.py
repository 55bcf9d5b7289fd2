"""Attention by a fused kernel of the device, where it has one for what a layer needs.

It computes what `xelm.models.attention` does, which is the reference, and what all other devices
and layers have. Blocks of keys that no query sees are skipped."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from xelm.models import tpu_attention
from xelm.models.config import ModelConfig
from xelm.models.context import Fused
from xelm.models.target import Target

Kernel = Callable[[Array, Array, Array, Array, Array], Array]
"""(query [B, T, N, H], key [B, T, K, H], value [B, T, K, H], segments [B, T], whether the layer is
local []) -> [B, T, N, H]"""
Spread = Callable[[Kernel], Kernel]
"""Makes a kernel for arrays that may be spread over devices of a kernel for those of one."""

_LARGEST_HEAD = 128
"""Head size up to which cuDNN has a kernel on every GPU since Ampere."""


def on_one_device(kernel: Kernel) -> Kernel:
    """The kernel itself, for arrays that lie on one device."""
    return kernel


class Form(NamedTuple):
    """What the layers of a model need of attention."""

    scale: float
    """Factor of the scores."""
    cap: float | None
    """Cap of the scores, as in `attention.attend`."""
    causal: bool
    window: int | None
    """Number of positions, its own included, up to which a query sees to each side in local layers;
    None: no layer is local."""


def fused_attention(
    config: ModelConfig,
    target: Target,
    dtype: DTypeLike,
    segments: Int[Array, "B T"],
    spread: Spread,
) -> Fused | None:
    """The fused attention of a model's layers on a kind of device, for sequences of which each
    token sees those of its own segment, and in decoders the earlier ones. None where the device
    has no kernel for such a model: for linear biases (ALiBi), none has."""
    if config.positions == "alibi":
        return None
    scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
    window = config.local_window if config.local_layers else None
    form, length = Form(scale, config.attention_cap, config.causal, window), segments.shape[1]
    own, rows = tpu_kernel(config), (length, config.head_count, dtype, target.fast_memory_bytes)
    if target.platform == "tpu" and own.fits(*rows):
        kernel = functools.partial(on_tpu, own, form)
    elif target.platform == "gpu" and _fits_gpu(form, config, dtype, length):
        kernel = functools.partial(on_gpu, form)
    else:
        return None
    compute = spread(kernel)
    return lambda query, key, value, local: compute(query, key, value, segments, local)


def tpu_kernel(config: ModelConfig) -> tpu_attention.Kernel:
    """The kernel of TPUs for a model's layers."""
    windowed = bool(config.local_layers)
    return tpu_attention.Kernel(config.head_size, config.attention_cap, config.causal, windowed)


def on_tpu(
    kernel: tpu_attention.Kernel,
    form: Form,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    local: Bool[Array, ""],
) -> Float[Array, "B T N H"]:
    """Attention by our kernel for TPUs."""
    length = query.shape[1]
    window = jnp.where(local, form.window or length, length).astype(jnp.int32)
    scaled = query * form.scale
    return tpu_attention.tpu_attention(kernel, scaled, key, value, segments, window)


def _fits_gpu(form, config, dtype, length):
    """Whether cuDNN's flash attention, which has no cap, no window to both sides, no float32, and
    with a mask no odd lengths, computes such layers."""
    sized = config.head_size % 8 == 0 and config.head_size <= _LARGEST_HEAD and length % 2 == 0
    known = form.cap is None and (form.causal or form.window is None)
    return sized and known and jnp.dtype(dtype).name in ("bfloat16", "float16")


def on_gpu(
    form: Form,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    local: Bool[Array, ""],
) -> Float[Array, "B T N H"]:
    """Attention by cuDNN."""
    same = segments[:, None, :, None] == segments[:, None, None, :]

    def attend(window):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=same,
            scale=form.scale,
            is_causal=form.causal,
            local_window_size=window,
            implementation="cudnn",
        )

    if (window := form.window) is None:
        return attend(None)
    return jax.lax.cond(local, lambda: attend((window - 1, 0)), lambda: attend(None))
