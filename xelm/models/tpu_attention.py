"""The fused attention of TPUs: scores never leave the fast memory beside the matrix units, and
blocks of keys that no query sees are skipped.

The algorithm is that of FlashAttention (Dao et al. 2022, arXiv 2205.14135). Queries, keys and
values are read as the products before write them, [B, T, N * H], in columns of 128 that hold the
values of one or several heads, and results are written so: JAX's own kernels (splash attention)
want heads first, and with heads of 64 the copies took longer than the kernel. Scores are [keys,
queries]: what is found of a query's scores lies along a row, and no sum runs across lanes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from xelm.models.attention import KEPT

LANES = 128
"""Values in a row of a TPU's registers: lengths and widths of blocks are multiples of it."""
_BLOCK = 512
"""Positions of a block, at most."""
_DTYPES = ("bfloat16", "float32")
"""Dtypes that the kernel's compiler loads."""
_MOST_GRADIENTS = 2**19
"""Values of each of three gradients, of a row of tokens, that are summed in fast memory."""
_MEMORY = 2**25
"""Bytes of fast memory that the backward pass may take for the longest rows: in bfloat16 18 for
each of these values, in float32 24, and blocks. For half as many, the usual 16 MB are enough, which
are all that a TPU v4 has."""
_LEAST = -1e30
"""A finite stand-in for minus infinity."""


class Kernel(NamedTuple):
    """What the kernel is compiled for."""

    head_size: int
    cap: float | None
    """Cap of the scores, as in `attention.attend`."""
    causal: bool
    windowed: bool
    """Whether a window may limit what a query sees."""
    interpret: bool = False
    """Whether it is computed as ordinary operations, on any device."""

    @property
    def width(self) -> int:
        """Columns that are read at once."""
        return max(LANES, self.head_size)

    def heads(self) -> list[slice]:
        """The heads among these columns."""
        firsts = range(0, self.width, self.head_size)
        return [slice(first, first + self.head_size) for first in firsts]

    def alone(self, columns, head):
        """Columns with zeros in place of all heads but one: products over all columns, or to all,
        take a matrix unit as long as those of one head."""
        if self.width == self.head_size:
            return columns
        place = jax.lax.broadcasted_iota(jnp.int32, columns.shape, 1)
        return jnp.where((place >= head.start) & (place < head.stop), columns, 0)

    def fits(self, length: int, heads: int, dtype: DTypeLike, fast_memory: int) -> bool:
        """Whether there is a kernel for rows of so many tokens, with so many heads of queries, of
        values of a dtype, on a TPU with so many bytes of fast memory."""
        divides = self.head_size == LANES // 2 or self.head_size % LANES == 0
        whole = heads * self.head_size % self.width == 0 and length % LANES == 0
        most = _MOST_GRADIENTS if fast_memory >= _MEMORY else _MOST_GRADIENTS // 2
        known = jnp.dtype(dtype).name in _DTYPES and length * self.width <= most
        return divides and whole and known


def tpu_attention(
    kernel: Kernel,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    window: Int[Array, ""],
) -> Float[Array, "B T N H"]:
    """Weighted means of values, as by `attention.attend` with a scale of 1: a query sees the keys
    of its own segment, fewer than `window` places away, and if causal, no later ones."""
    heads, keys = query.shape[2], key.shape[2]
    if heads != keys and kernel.width > kernel.head_size:
        # Heads of queries that share columns need not share a head of keys.
        key, value = (jnp.repeat(x, heads // keys, axis=2) for x in (key, value))
    columns = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
    mixed: Any = _mixed(kernel, *columns, segments, window.reshape(1))
    return mixed.reshape(query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(kernel, query, key, value, segments, window):
    return _forward(kernel, query, key, value, segments, window)[0]


def _forward(kernel, query, key, value, segments, window):
    rows, length, columns = query.shape
    blocks = _Blocks.of(kernel, length)
    heads, groups = kernel.heads(), columns // key.shape[2]
    queries, keys = blocks.specs(groups, queries_outside=True)
    mixed, logs = pl.pallas_call(
        functools.partial(_forward_block, kernel, blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, key.shape[2] // kernel.width, groups, blocks.count, blocks.count),
            in_specs=[queries.columns, keys.columns, keys.columns, queries.across, keys.down],
            out_specs=[queries.columns, queries.heads],
            scratch_shapes=[
                pltpu.VMEM((len(heads), 1, blocks.size), jnp.float32),
                pltpu.VMEM((len(heads), 1, blocks.size), jnp.float32),
                pltpu.VMEM((kernel.width, blocks.size), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((rows, columns // kernel.head_size, 1, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "parallel", "arbitrary")
        ),
        name="attention_forward",
        interpret=kernel.interpret,
    )(window, query, key, value, *_both_ways(segments)[::-1])
    mixed, logs = checkpoint_name(mixed, KEPT), checkpoint_name(logs, KEPT)
    return mixed, (query, key, value, segments, window, mixed, logs)


def _forward_block(
    kernel, blocks, window, query, key, value, across, down, mixed, logs, top, total, sums
):
    """One block of queries and keys. Of each query, `top` is the largest score so far, `total` the
    sum of exponentials and `sums` that of values by these; the last block divides them."""
    place, other = pl.program_id(3), pl.program_id(4)
    first, last = blocks.seen(window, place)

    @pl.when(other == 0)
    def begin():
        top[...] = jnp.full_like(top, _LEAST)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when((other >= first) & (other <= last))
    def add():
        mask = blocks.mask(window, other, place, down[:, :1], across[...])
        for number, head in enumerate(kernel.heads()):
            scores = _product(kernel.alone(key[...], head), query[...], (1, 1))
            if kernel.cap is not None:
                scores = kernel.cap * jnp.tanh(scores / kernel.cap)
            scores = jnp.where(mask, scores, _LEAST)
            before = top[number]
            now = jnp.maximum(before, scores.max(axis=0, keepdims=True))
            weights = jnp.exp(scores - now)
            shrunk = jnp.exp(before - now)
            top[number] = now
            total[number] = shrunk * total[number] + weights.sum(axis=0, keepdims=True)
            part = _product(value[:, head], weights.astype(value.dtype), (0, 0))
            sums[head] = shrunk * sums[head] + part

    @pl.when(other == blocks.count - 1)
    def end():
        for number, head in enumerate(kernel.heads()):
            sums[head] = sums[head] / total[number]
            logs[number] = top[number] + jnp.log(total[number])
        mixed[...] = sums[...].T.astype(mixed.dtype)


def _backward(kernel, kept, cotangent):
    query, key, value, segments, window, mixed, logs = kept
    rows, length, columns = query.shape
    blocks = _Blocks.of(kernel, length)
    heads, groups = columns // kernel.head_size, columns // key.shape[2]
    cotangent = cotangent.astype(value.dtype)
    # What a row's softmax takes from each of its scores' gradients.
    common = cotangent.astype(jnp.float32) * mixed.astype(jnp.float32)
    # By a product, in float32: a sum over each head's columns would be of a transposed copy.
    of_head = jnp.repeat(jnp.eye(heads, dtype=jnp.float32), kernel.head_size, axis=1)
    exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    common = jnp.einsum("NC,BTC->BNT", of_head, common, **exact)[:, :, None]
    queries, keys = blocks.specs(groups, queries_outside=False)
    whole = (None, length, kernel.width)
    by_keys = pl.BlockSpec(whole, lambda row, column, *_: (row, 0, column))
    by_query = pl.BlockSpec(whole, lambda row, column, group, *_: (row, 0, column * groups + group))
    found = pl.pallas_call(
        functools.partial(_backward_block, kernel, blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, key.shape[2] // kernel.width, groups, blocks.count, blocks.count),
            in_specs=[
                *(queries.columns, keys.columns, keys.columns, queries.columns),
                *(queries.heads, queries.heads, keys.down, queries.across),
            ],
            out_specs=[by_query, by_keys, by_keys],
            scratch_shapes=[pltpu.VMEM(whole[1:], jnp.float32)] * 3,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            # No more than needed: XLA has the rest for what it reads ahead.
            vmem_limit_bytes=_MEMORY if length * kernel.width > _MOST_GRADIENTS // 2 else None,
        ),
        name="attention_backward",
        interpret=kernel.interpret,
    )(window, query, key, value, cotangent, logs, common, *_both_ways(segments))
    return *found, None, None


def _backward_block(
    kernel, blocks, window, query, key, value, given, logs, common, down, across, *results
):
    """One block of keys and queries. All three gradients are summed for a whole row: that by
    queries over blocks of keys, and those by keys and values over the heads that share them."""
    *found, query_sums, key_sums, value_sums = results
    by_query, by_key, by_value = found
    group, place, other = (pl.program_id(axis) for axis in (2, 3, 4))
    first, last = blocks.seen(window, place, by_keys=True)
    own, at = (pl.ds(number * blocks.size, blocks.size) for number in (place, other))

    @pl.when((place == 0) & (other == 0))
    def begin():
        query_sums[...] = jnp.zeros_like(query_sums)

    @pl.when((group == 0) & (other == 0))
    def begin_keys():
        key_sums[own] = jnp.zeros((blocks.size, kernel.width), jnp.float32)
        value_sums[own] = jnp.zeros((blocks.size, kernel.width), jnp.float32)

    @pl.when((other >= first) & (other <= last))
    def add():
        mask = blocks.mask(window, place, other, down[:, :1], across[...])
        for number, head in enumerate(kernel.heads()):
            q, k, v, cotangent = (kernel.alone(x[...], head) for x in (query, key, value, given))
            scores, slope = _product(k, query[...], (1, 1)), None
            if kernel.cap is not None:
                bent = jnp.tanh(scores / kernel.cap)
                scores, slope = kernel.cap * bent, 1 - bent * bent
            weights = jnp.where(mask, jnp.exp(scores - logs[number]), 0.0)
            value_sums[own] += _product(weights.astype(v.dtype), cotangent, (1, 0))
            error = weights * (_product(v, given[...], (1, 1)) - common[number])
            error = error if slope is None else error * slope
            error = error.astype(k.dtype)
            key_sums[own] += _product(error, q, (1, 0))
            query_sums[at] += _product(error, k, (0, 0))

    ends = other == blocks.count - 1

    @pl.when(ends & (group == pl.num_programs(2) - 1))
    def end_keys():
        by_key[own] = key_sums[own].astype(by_key.dtype)
        by_value[own] = value_sums[own].astype(by_value.dtype)

    @pl.when(ends & (place == blocks.count - 1))
    def end():
        by_query[...] = query_sums[...].astype(by_query.dtype)


_mixed.defvjp(_forward, _backward)


class _Specs(NamedTuple):
    """Blocks of arrays that belong to one of the two sides of a block of scores."""

    columns: Any
    """[B, T, columns]"""
    heads: Any
    """[B, N, 1, T]"""
    down: Any
    """[B, T, 128]"""
    across: Any
    """[B, 1, T]"""


class _Blocks(NamedTuple):
    """The blocks of a row of tokens, and which of them see each other."""

    kernel: Kernel
    size: int
    count: int

    @classmethod
    def of(cls, kernel, length):
        size = max(n for n in (LANES, 2 * LANES, _BLOCK) if length % n == 0)
        return cls(kernel, size, length // size)

    def seen(self, window, place, *, by_keys=False):
        """First and last block of keys that a block of queries sees; by_keys: of queries that see a
        block of keys."""
        first, last = 0, self.count - 1
        if self.kernel.windowed:
            reach = window[0] - 1
            # Of numbers that are not negative; // would look at signs.
            first = jax.lax.div(jnp.maximum(place * self.size - reach, 0), self.size)
            end = place * self.size + self.size - 1 + reach
            last = jnp.minimum(jax.lax.div(end, self.size), last)
        if self.kernel.causal:
            first, last = (place, last) if by_keys else (first, place)
        return first, last

    def mask(self, window, keys, queries, down, across):
        """Whether keys are seen by queries, [keys, queries], of blocks with these numbers. down,
        across: the segments of the keys, [size, 1], and of the queries, [1, size]."""
        mask = down == across
        shape = self.size, self.size
        distance = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + (queries - keys) * self.size
        distance = distance - jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        if self.kernel.causal:
            mask = mask & (distance >= 0)
        if self.kernel.windowed:
            distance = distance if self.kernel.causal else jnp.abs(distance)
            mask = mask & (distance < window[0])
        return mask

    def specs(self, groups, *, queries_outside):
        """Specifications of blocks of queries and of keys, for a grid of rows, columns of keys,
        heads of queries that share them, and blocks of which one kind runs in the outer loop."""
        heads, size, width = len(self.kernel.heads()), self.size, self.kernel.width

        def side(of_queries):
            def index(order):
                def indices(row, column, group, place, other, window):
                    if of_queries:
                        column = column * groups + group
                    if of_queries == queries_outside:
                        return order(row, column, place)
                    # What is not computed is not read: the block that is there is named again.
                    first, last = self.seen(window, place, by_keys=of_queries)
                    return order(row, column, jnp.clip(other, first, last))

                return indices

            return _Specs(
                pl.BlockSpec((None, size, width), index(lambda b, c, t: (b, t, c))),
                pl.BlockSpec((None, heads, 1, size), index(lambda b, c, t: (b, c, 0, t))),
                pl.BlockSpec((None, size, LANES), index(lambda b, c, t: (b, t, 0))),
                pl.BlockSpec((None, 1, size), index(lambda b, c, t: (b, 0, t))),
            )

        return side(True), side(False)


def _product(one, other, axes):
    """The product of two matrices, summed over one axis of each, float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(one, other, dimensions, preferred_element_type=jnp.float32)


def _both_ways(segments):
    """Segments as [B, T, 128], to be read down, and as [B, 1, T], to be read across."""
    down = jnp.broadcast_to(segments[:, :, None], (*segments.shape, LANES))
    return down, segments[:, None]
