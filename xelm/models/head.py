"""The output head: scores over the vocabulary, and log-probabilities of given tokens.

Multilingual vocabularies are huge (XGLM: 256,008), so logits exist only for a chunk of positions at
a time: [B, T, V] in float32 would dwarf the model. Dimension letters: see `xelm.models.config`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from xelm.models.config import ModelConfig
from xelm.models.layers import ACTIVATIONS, Linear, Norm
from xelm.models.products import by_rows_of
from xelm.models.target import CPU, Target

LOGITS_IN_A_CHUNK = 2**22
"""Number of logits that a CPU computes at once: 2^22 float32 are 16 MiB, which stays near its
caches."""
_LEAST_ON_CPU = 64
_TILE = 256
"""Positions of a chunk on an accelerator are a multiple of this: the side of the largest matrix
units, those of a TPU v6e; that of others divides it."""
_LARGEST_CHUNK = 2048
"""Positions of a chunk on an accelerator, at most. Each chunk reads and writes the gradient of the
head's matrix, 8 bytes for 6 operations a position, so that from about 400 positions on the products
take longer than the memory (8 / 6 of a byte an operation, and some 300 operations a byte)."""
_SHARE_OF_MEMORY = 8
"""The logits of a chunk, in float32, take at most 1/8 of an accelerator's memory."""

Product = Callable[[Array, Any, DTypeLike | None], Array]
"""(x [M, I], matrix [O, I], dtype) -> x @ matrix.T [M, O], in that dtype"""


def plain_product(x: Float[Array, "M I"], matrix: Float[Array, "O I"], dtype=None) -> Array:
    """The product x @ matrix.T [M, O], as XLA computes it."""
    return jnp.einsum("MI,OI->MO", x, matrix.astype(x.dtype), preferred_element_type=dtype)


class HeadTransform(nnx.Module):
    """The dense layer and norm that states of an encoder pass before its output head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        width, bias = config.width, config.head_transform_bias
        axes = ("width", "transformed")  # only one can be spread over a mesh axis
        self.dense = Linear(
            None, width, width, bias=bias, scale=0.02, axes=axes, rngs=rngs, dtype=dtype
        )
        self.norm = Norm(config, None, dtype)
        self.activate = ACTIVATIONS[config.activation]

    def __call__(self, h: Float[Array, "M D"]) -> Float[Array, "M D"]:
        return self.norm(self.activate(self.dense(h)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Head:
    """The output head, a tree of arrays: gradients by it have the same shape."""

    matrix: Any
    """Float [V, D]; for inference it may be an `Int8Matrix`."""
    bias: Any = None
    """Float [V], or None."""
    cap: float | None = field(default=None, metadata={"static": True})
    """Cap of the logits, as `ModelConfig.logit_cap`."""
    known: int | None = field(default=None, metadata={"static": True})
    """Number of the first ids that can come, at most as many as the matrix has rows; the scores of
    the others are -inf. None: all."""
    size: int | None = field(default=None, metadata={"static": True})
    """Number of ids V, where `known` is given; otherwise that of the rows of the matrix."""
    factors: Any = None
    """Two thin matrices, a [rank, D] and b [V, rank], whose product b @ a is added to the matrix
    without being made; None: there are none."""
    scale: float = field(default=1.0, metadata={"static": True})
    """Factor of the logits before their cap, as `ModelConfig.logit_scale`."""
    target: Target = field(default=CPU, metadata={"static": True})
    """The kind of device that the program is compiled for."""

    @jax.named_scope("head")
    def logits(
        self, states: Float[Array, "*B D"], product: Product = plain_product
    ) -> Float[Array, "*B V"]:
        """Scores over the vocabulary, float32."""
        flat = states.reshape(-1, states.shape[-1])
        scores = product(flat, self.matrix, jnp.float32)
        if self.factors is not None:
            a, b = (factor.astype(states.dtype) for factor in self.factors)
            scores = scores + product(flat @ a.T, b, jnp.float32)
        if self.bias is not None:
            scores = scores + self.bias.astype(jnp.float32)[None]
        if self.scale != 1.0:
            scores = scores * self.scale
        if self.cap is not None:
            scores = self.cap * jnp.tanh(scores / self.cap)
        if self.known is not None and self.size is not None:
            missing = ((0, 0), (0, self.size - self.known))
            scores = jnp.pad(scores[:, : self.known], missing, constant_values=-jnp.inf)
        return scores.reshape(*states.shape[:-1], -1)


def target_log_probabilities(
    states: Float[Array, "*B D"], head: Head, targets: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """Log-probability of each target given the state at its position, in nats; for inference."""

    def chunk(inputs):
        part, wanted = inputs
        logits = head.logits(part, by_rows_of)
        chosen = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    flat = states.reshape(-1, states.shape[-1])
    scores = jax.lax.map(chunk, in_chunks(head, flat, targets.reshape(-1)))
    return scores.reshape(-1)[: flat.shape[0]].reshape(targets.shape)


def in_chunks(head: Head, *arrays: Array) -> tuple[Array, ...]:
    """Each [M, ...] as [chunks, M / chunks, ...], with zeros at the end to fill the last chunk."""
    positions = arrays[0].shape[0]
    size = positions_in_a_chunk(positions, head.matrix.shape[0], head.target)
    padding = -positions % size
    return tuple(
        jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)).reshape(-1, size, *a.shape[1:])
        for a in arrays
    )


def positions_in_a_chunk(positions: int, vocabulary_size: int, target: Target) -> int:
    """Number of positions, of so many, whose logits are computed at once."""
    if not target.is_accelerator:
        return min(positions, max(_LEAST_ON_CPU, LOGITS_IN_A_CHUNK // vocabulary_size))
    of_a_position = 4 * vocabulary_size
    most = target.memory_bytes // _SHARE_OF_MEMORY // of_a_position
    most = max(_TILE, min(most, _LARGEST_CHUNK) // _TILE * _TILE)
    chunks = -(-positions // most)
    # Chunks of equal size: positions that only fill the last one take as long as others.
    return min(positions, -(-positions // chunks // _TILE) * _TILE)
