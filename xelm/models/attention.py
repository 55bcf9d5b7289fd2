"""Scaled dot-product attention with grouped keys, as functions on arrays.

Scores exist for one block of queries at a time, and are made again on the way back (as in
FlashAttention: Dao et al. 2022, arXiv 2205.14135): a layer keeps its queries, keys, values and
result, and nothing that grows with the square of the length.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

_BLOCKS = 8
"""Of queries: with so many, a causal layer saves 44% of the scores."""
_LEAST_BLOCK, _LARGEST_BLOCK = 64, 512
"""Queries; smaller products miss the fast kernels, larger ones need much memory."""


KEPT = "attended"
"""Name of what is kept for the way back by who computes layers again (`jax.checkpoint`)."""


class Bias(NamedTuple):
    """Linear biases: scores of keys further back are lower, by a slope for each head."""

    slopes: Float[Array, " N"]
    key_positions: Int[Array, "B S"]


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    cap: float | None = None,
    bias: Bias | None = None,
    causal: bool = False,
) -> Float[Array, "B T N H"]:
    """Weighted means of values, by softmax of scale * query . key in float32. Keys and values have
    heads before positions: batched products of contiguous matrices are the ones that XLA hands to
    its fast kernels on CPUs, and a cache that lies so is read as it is.

    cap: a score s becomes cap * tanh(s / cap) (Gemma Team 2024, arXiv 2408.00118, section 2).
    causal: says that the mask lets nobody see later positions, so that those need no scores. A
    query that may see nothing gets a mean of some, and gives no gradient; nor does `bias`.
    """
    batch, length, heads, size = query.shape
    groups = heads // key.shape[1]
    query = (query * scale).reshape(batch, length, key.shape[1], groups, size)
    query = query.transpose(0, 2, 3, 1, 4)
    shift = None
    if bias is not None:
        # Absolute positions of keys do: softmax does not mind what is the same for all of them.
        slopes = bias.slopes.reshape(1, key.shape[1], groups, 1, 1)
        shift = slopes * bias.key_positions[:, None, None, None].astype(jnp.float32)
    mixed: Any = _mixed(_Form(cap, causal), query, key, value, mask, shift)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


class _Form(NamedTuple):
    cap: float | None
    causal: bool

    def spans(self, length: int, keys: int) -> list[tuple[slice, slice]]:
        """Blocks of queries, each with the keys that it may see."""
        block = min(max(_LEAST_BLOCK, -(-length // _BLOCKS)), _LARGEST_BLOCK)
        return [
            (
                slice(start, start + block),
                slice(0, min(start + block, keys) if self.causal else keys),
            )
            for start in range(0, length, block)
        ]

    def scores(self, query: Any, key: Any, shift: Any) -> tuple[Any, Any]:
        """Of a block, float32 [B K G T S], whatever may be seen; and tanh(s / cap) if capped."""
        scores = jnp.einsum("BKGTH,BKSH->BKGTS", query, key, preferred_element_type=jnp.float32)
        bent = None
        if self.cap is not None:
            bent = jnp.tanh(scores / self.cap)
            scores = self.cap * bent
        if shift is not None:
            scores = scores + shift
        return scores, bent


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(form, query, key, value, mask, shift):
    return _forward(form, query, key, value, mask, shift)[0]


def _forward(form, query, key, value, mask, shift):
    mixed, logs = [], []
    for rows, seen in form.spans(query.shape[3], key.shape[2]):
        near = None if shift is None else shift[..., seen]
        scores, _ = form.scores(query[..., rows, :], key[:, :, seen], near)
        # A finite stand-in for minus infinity: a row with nothing to see gives a mean, not a NaN.
        scores = jnp.where(mask[:, None, None, rows, seen], scores, jnp.finfo(jnp.float32).min)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights.astype(value.dtype)
        sums = jnp.einsum(
            "BKGTS,BKSH->BKGTH", weights, value[:, :, seen], preferred_element_type=jnp.float32
        )
        mixed.append((sums / total).astype(value.dtype))
        logs.append(top + jnp.log(total))
    mixed = checkpoint_name(jnp.concatenate(mixed, axis=3), KEPT)
    logs = checkpoint_name(jnp.concatenate(logs, axis=3), KEPT)
    return mixed, (query, key, value, mask, shift, mixed, logs)


def _backward(form, kept, cotangent):
    query, key, value, mask, shift, mixed, logs = kept
    cotangent = cotangent.astype(value.dtype)
    key_gradient: Any = None
    value_gradient: Any = None
    query_gradients = []
    # What a row's softmax takes from each of its scores' gradients.
    common = jnp.sum(
        cotangent.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1, keepdims=True
    )
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    for rows, seen in form.spans(query.shape[3], key.shape[2]):
        part, given = query[..., rows, :], cotangent[..., rows, :]
        near = None if shift is None else shift[..., seen]
        scores, bent = form.scores(part, key[:, :, seen], near)
        weights = jnp.exp(scores - logs[..., rows, :])
        weights = jnp.where(mask[:, None, None, rows, seen], weights, 0.0)
        error = product("BKGTH,BKSH->BKGTS", given, value[:, :, seen])
        error = weights * (error - common[..., rows, :])
        if bent is not None:
            error = error * (1 - jnp.square(bent))
        error, weights = error.astype(key.dtype), weights.astype(value.dtype)
        query_gradients.append(product("BKGTS,BKSH->BKGTH", error, key[:, :, seen]))
        key_part = product("BKGTH,BKGTS->BKHS", part, error)
        value_part = product("BKGTH,BKGTS->BKHS", given, weights)
        key_gradient = _added(key_gradient, key_part, seen, key.shape[2])
        value_gradient = _added(value_gradient, value_part, seen, key.shape[2])
    query_gradient = jnp.concatenate(query_gradients, axis=3).astype(query.dtype)
    # Of one block alone, XLA would make the exchange within the product, which its products of
    # bfloat16 cannot do on CPUs.
    key_gradient, value_gradient = jax.lax.optimization_barrier((key_gradient, value_gradient))
    key_gradient = key_gradient.mT.astype(key.dtype)
    value_gradient = value_gradient.mT.astype(value.dtype)
    return query_gradient, key_gradient, value_gradient, None, None


def _added(sums, part, seen, length):
    """Gradients of all keys with those of some; None: there are no others yet."""
    if sums is None:
        # On a mesh they lie where these do. Zeros would lie everywhere, and so would all sums.
        return jnp.pad(part, ((0, 0), (0, 0), (0, 0), (0, length - seen.stop)))
    return sums.at[..., seen].add(part)


_mixed.defvjp(_forward, _backward)
