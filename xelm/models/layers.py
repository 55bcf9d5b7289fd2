"""Dense layers and norms of the transformer. Their parameters are stacked over its layers on a
leading axis, except where a layer count of None says that there is a single one."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from xelm.models.config import ModelConfig
from xelm.models.products import by_rows_of

XIELU_BETA, XIELU_EPSILON = 0.5, -1e-6
"""Constants of xIELU as transformers computes it, which stores them beside its parameters."""

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Linear(nnx.Module):
    """Dense layer: x @ weight + bias, and where it has an adapter, x @ (weight + scale * A @ B)
    + bias, without that matrix being made. `axes` name the weight's dimensions for sharding. It
    works on [B*T, D]: with a [B, T, D] operand, XLA on CPUs computes the weight gradient on a
    transposed copy and misses its fast kernels."""

    outputs_first: bool = False
    """Whether the weight is [outputs, inputs], and the adapter's factors [rank, inputs] and
    [outputs, rank], as in the layout of inference; the weight may be narrow then."""
    lora_scale: float = 1.0
    """Factor of the adapter's product."""

    def __init__(
        self,
        layers: int | None,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        scale: float,
        axes: tuple[str, str],
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        stack, stacked = _stack(layers)
        weight = scale * jax.random.normal(rngs.params(), (*stack, inputs, outputs), jnp.float32)
        self.weight = nnx.Param(weight.astype(dtype), axes=(*stacked, *axes))
        zeros = jnp.zeros((*stack, outputs), dtype) if bias else None
        self.bias = None if zeros is None else nnx.Param(zeros, axes=(*stacked, axes[1]))
        # The factors of an adapter, where `adapt` gives it one.
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)

    def adapt(self, scale: float = 1.0) -> None:
        """Gives the layer an adapter, whose factors come with the parameters that a model of this
        graph is bound to."""
        self.lora_scale = scale
        self.lora_a, self.lora_b = (
            nnx.Param(jax.ShapeDtypeStruct((), jnp.float32)) for _ in range(2)
        )

    def __call__(self, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
        weight = self.weight[...]
        y = by_rows_of(x, weight) if self.outputs_first else x @ weight.astype(x.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
            few = x @ (a.T if self.outputs_first else a) * self.lora_scale
            y = y + few @ (b.T if self.outputs_first else b)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)[None]


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last dimension, computed in float32. heads: number of heads of
    the queries or keys that pass it, for a norm of those, in the form `head_norm_form` (Dehghani et
    al. 2023, arXiv 2302.05442)."""

    def __init__(
        self,
        config: ModelConfig,
        layers: int | None,
        dtype: DTypeLike,
        *,
        heads: int | None = None,
    ):
        stack, stacked = _stack(layers)
        size = {
            "shared": (config.head_size,),
            "each": (heads or 0, config.head_size),
            "joint": ((heads or 0) * config.head_size,),
        }[config.head_norm_form]
        size, axis = ((config.width,), "width") if heads is None else (size, "head")
        shape, axes = (*stack, *size), (*stacked, *[axis] * len(size))
        self.scale = nnx.Param(jnp.full(shape, 1 - config.norm_offset, dtype), axes=axes)
        biased = config.norm_bias and heads is None
        self.bias = nnx.Param(jnp.zeros(shape, dtype), axes=axes) if biased else None
        self.centred = config.norm == "layer" and (heads is None or config.head_norm_form == "each")
        self.offset, self.epsilon = config.norm_offset, config.norm_epsilon

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        h = x.astype(jnp.float32)
        if self.centred:
            h = h - h.mean(axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(jnp.float32)
        ones = (1,) * (x.ndim - scale.ndim)
        h = h * (self.offset + scale).reshape(*ones, *scale.shape)
        if self.bias is not None:
            h = h + self.bias[...].astype(jnp.float32).reshape(*ones, *scale.shape)
        return h.astype(x.dtype)


class XIELU(nnx.Module):
    """The activation xIELU (Huang and Schlag 2024, arXiv 2411.13010, section 4): quadratic above
    zero and a shifted exponential below, with a factor of each that is trained. What is stored
    becomes the factor by softplus."""

    def __init__(self, layers: int | None, dtype: DTypeLike):
        stack, stacked = _stack(layers)

        def parameter(factor):
            value = jnp.log(jnp.expm1(jnp.full((*stack, 1), factor, jnp.float32)))
            return nnx.Param(value.astype(dtype), axes=(*stacked, "factor"))

        self.alpha_p, self.alpha_n = parameter(0.8), parameter(0.8 - XIELU_BETA)

    def __call__(self, x: Float[Array, "M F"]) -> Float[Array, "M F"]:
        h = x.astype(jnp.float32)
        above, below = (
            jax.nn.softplus(each[...].astype(jnp.float32))[None]
            for each in (self.alpha_p, self.alpha_n)
        )
        curved = jnp.expm1(jnp.minimum(h, XIELU_EPSILON)) - h
        found = jnp.where(h > 0, above * h * h, curved * (XIELU_BETA + below)) + XIELU_BETA * h
        return found.astype(x.dtype)


def _stack(layers: int | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Leading dimensions of a parameter, and their names."""
    return ((), ()) if layers is None else ((layers,), ("layers",))
