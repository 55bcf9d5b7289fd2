"""Scaled dot-product attention with grouped keys, as functions on arrays.

Scores exist for one block of queries at a time, and the backward pass computes them again (as in
FlashAttention: Dao et al. 2022, arXiv 2205.14135): a layer keeps its queries, keys, values and
result, and nothing that grows with the square of the length."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

_BLOCKS = 8
"""Number of blocks of queries, within the lengths below; 8 save a causal layer 44% of scores."""
_LEAST_BLOCK, _LARGEST_BLOCK = 64, 512
"""Queries in a block; smaller products miss the fast kernels, larger ones need much memory."""

_FEW_QUERIES = 16
"""Queries of a key head up to which products read the keys row by row."""

KEPT = "attended"
"""Name of the results that a policy of `jax.checkpoint` can keep for the backward pass."""


class Bias(NamedTuple):
    """Linear biases (ALiBi): each head has a slope by which scores fall with distance."""

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
    window: int | None = None,
    local: Bool[Array, ""] | None = None,
) -> Float[Array, "B T N H"]:
    """Weighted means of values, by softmax of scale * query . key, computed in float32.

    Keys and values have heads before positions: XLA hands batched products of contiguous matrices
    to its fast kernels on CPUs, and a cache in this layout is read as it is.

    mask: whether a query attends to a key. A query that attends to none gets a mean of some values
    and gives no gradient; nor does `bias`. cap: a score s becomes cap * tanh(s / cap) (Gemma Team
    2024, arXiv 2408.00118, section 2). causal: whether the mask excludes all later positions, for
    which no scores are then computed; nor are there of keys `window` or more places before or after
    a query, if that is given and the layer is `local` (None: if it is given): the mask excludes
    them."""
    batch, length, heads, size = query.shape
    groups = heads // key.shape[1]
    query = (query * scale).reshape(batch, length, key.shape[1], groups, size)
    query = query.transpose(0, 2, 3, 1, 4)
    shift = None
    if bias is not None:
        # Absolute positions will do: softmax is the same when all scores of a query shift alike.
        slopes = bias.slopes.reshape(1, key.shape[1], groups, 1, 1)
        shift = slopes * bias.key_positions[:, None, None, None].astype(jnp.float32)
    form = _Form(cap, causal, window)
    mixed: Any = _mixed(form, query, key, value, mask, shift, None if window is None else local)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


class _Form(NamedTuple):
    cap: float | None
    causal: bool
    window: int | None = None

    def spans(self, length: int, keys: int) -> list[tuple[slice, slice]]:
        """Blocks of queries, each with the keys that it may attend to."""
        block = min(max(_LEAST_BLOCK, -(-length // _BLOCKS)), _LARGEST_BLOCK)
        found = []
        for begin in range(0, length, block):
            first, last = 0, begin + block if self.causal else keys
            if self.window is not None:
                # From a multiple of the least block on, which fast kernels want.
                first = max(0, begin - self.window + 1) // _LEAST_BLOCK * _LEAST_BLOCK
                last = min(last, begin + block + self.window - 1)
            found.append((slice(begin, begin + block), slice(first, min(last, keys))))
        return found

    def by_locality(self, compute: Any, local: Any, *arrays: Any) -> Any:
        """What `compute` makes of a form and arrays, where the layer may be local or not."""
        if local is None:
            return compute(self, *arrays)
        whole = functools.partial(compute, self._replace(window=None))
        return jax.lax.cond(local, functools.partial(compute, self), whole, *arrays)

    def scores(self, query: Any, key: Any, shift: Any) -> tuple[Any, Any]:
        """Scores before the mask, float32 [B K G T S]; and tanh(s / cap), None without a cap."""
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        if not self.causal and query.shape[2] * query.shape[3] <= _FEW_QUERIES:
            # As the second factor XLA would transpose the keys, which on CPUs takes far longer than
            # the product: 40 ms and 2 ms for 8,192 keys of 256 numbers.
            scores = jnp.moveaxis(product("BKSH,BKGTH->BKSGT", key, query), 2, 4)
        else:
            scores = product("BKGTH,BKSH->BKGTS", query, key)
        bent = None
        if self.cap is not None:
            bent = jnp.tanh(scores / self.cap)
            scores = self.cap * bent
        if shift is not None:
            scores = scores + shift
        return scores, bent


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(form, query, key, value, mask, shift, local):
    return _forward(form, query, key, value, mask, shift, local)[0]


def _forward(form, query, key, value, mask, shift, local):
    mixed, logs = form.by_locality(_blocks, local, query, key, value, mask, shift)
    # Named outside of the choice between two forms, of which each would keep its own.
    mixed, logs = checkpoint_name(mixed, KEPT), checkpoint_name(logs, KEPT)
    return mixed, (query, key, value, mask, shift, local, mixed, logs)


def _blocks(form, query, key, value, mask, shift):
    """Weighted means of values, and the logarithms of the sums by which they are divided."""
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
    return jnp.concatenate(mixed, axis=3), jnp.concatenate(logs, axis=3)


def _backward(form, kept, cotangent):
    query, key, value, mask, shift, local, mixed, logs = kept
    arrays = query, key, value, mask, shift, mixed, logs, cotangent.astype(value.dtype)
    return *form.by_locality(_gradients, local, *arrays), None, None, None


def _gradients(form, query, key, value, mask, shift, mixed, logs, cotangent):
    """Gradients by query, key and value."""
    key_gradient: Any = None
    value_gradient: Any = None
    query_gradients = []
    # What a row's softmax takes from each of its scores' gradients.
    common = cotangent.astype(jnp.float32) * mixed.astype(jnp.float32)
    common = common.sum(axis=-1, keepdims=True)
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
    # If there is only one block, XLA would fuse the transposition into the product, which its
    # products of bfloat16 cannot do on CPUs.
    key_gradient, value_gradient = jax.lax.optimization_barrier((key_gradient, value_gradient))
    key_gradient = key_gradient.mT.astype(key.dtype)
    value_gradient = value_gradient.mT.astype(value.dtype)
    return query_gradient, key_gradient, value_gradient


def _added(sums, part, seen, length):
    """Gradients by all keys, with those by some keys added. sums: None at first."""
    if sums is None:
        # On a mesh, padding lies where the part does; zeros would be replicated, and so all sums.
        return jnp.pad(part, ((0, 0), (0, 0), (0, 0), (seen.start, length - seen.stop)))
    return sums.at[..., seen].add(part)


_mixed.defvjp(_forward, _backward)
