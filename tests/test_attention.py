"""Attention and its gradients are those of the formula, whatever may be seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xelm.models.attention import Bias, attend

B, T, H = 2, 150, 8  # three blocks of queries, the last one short


def drawn(heads, keys, dtype=jnp.float32):
    draw = np.random.default_rng(0)
    shapes = [(B, T, heads, H), (B, keys, T, H), (B, keys, T, H), (B, T, heads, H)]
    return [jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes]


def masks():
    """Causal and full masks of rows of two documents; no token attends to the first ten."""
    segments = np.array([[0] * 10 + [1] * 60 + [2] * 80, [0] * 10 + [1] * 140])
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
    return {True: jnp.asarray(np.tril(same)), False: jnp.asarray(same)}


def formula(query, key, value, mask, scale, cap, bias):
    """Softmax over all keys at once, and one head of queries after the other."""
    groups = query.shape[2] // key.shape[1]
    found = []
    for head in range(query.shape[2]):
        k, v = key[:, head // groups], value[:, head // groups]
        scores = scale * jnp.einsum("BTH,BSH->BTS", query[:, :, head], k)
        if cap is not None:
            scores = cap * jnp.tanh(scores / cap)
        if bias is not None:
            scores = scores + bias.slopes[head] * bias.key_positions[:, None].astype(jnp.float32)
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
        found.append(jnp.einsum("BTS,BSH->BTH", weights, v))
    return jnp.stack(found, axis=2)


def both_ways(function, inputs, cotangent):
    """What a function finds and what it passes back, compiled whole: operation by operation takes
    several times as long."""

    @jax.jit
    def run(inputs, cotangent):
        found, way_back = jax.vjp(function, *inputs)
        return found, way_back(cotangent)

    return run(inputs, cotangent)


BIAS = Bias(jnp.asarray([0.06, 0.03, 0.02, 0.01]), jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1)))


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
@pytest.mark.parametrize(
    ("heads", "keys", "cap", "bias"),
    [(4, 4, None, None), (4, 2, 0.7, None), (4, 1, None, BIAS)],
    ids=["plain", "capped, in groups", "biased, one key"],
)
def test_results_and_gradients_are_those_of_the_formula(heads, keys, cap, bias, causal):
    *inputs, cotangent = drawn(heads, keys)
    mask, options = masks()[causal], {"scale": 0.4, "cap": cap, "bias": bias}
    # Rows that see nothing: a mean of whatever is there, and nothing is learned of them.
    cotangent = cotangent * mask.any(axis=-1)[:, :, None, None]

    def ours(*inputs):
        return attend(*inputs, mask, causal=causal, **options)

    def theirs(*inputs):
        return formula(*inputs, mask, **options)

    found, gradients = both_ways(ours, inputs, cotangent)
    wanted, others = both_ways(theirs, inputs, cotangent)
    seeing = np.asarray(mask.any(axis=-1))
    np.testing.assert_allclose(found[seeing], wanted[seeing], atol=2e-6)
    for one, other in zip(gradients, others):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
@pytest.mark.parametrize("local", [True, False, None], ids=["local", "global", "all local"])
def test_blocks_beyond_a_window_are_skipped_where_layers_are_local(causal, local):
    window = 20
    place = np.arange(T)
    near = (np.abs(place[:, None] - place) < window)[None]
    mask = masks()[causal] & (True if local is False else near)
    *inputs, cotangent = drawn(4, 2)
    cotangent = cotangent * mask.any(axis=-1)[:, :, None, None]
    which = None if local is None else jnp.asarray(local)

    def ours(*inputs):
        return attend(*inputs, mask, scale=0.4, causal=causal, window=window, local=which)

    found, gradients = both_ways(ours, inputs, cotangent)
    wanted, others = both_ways(lambda *x: formula(*x, mask, 0.4, None, None), inputs, cotangent)
    seeing = np.asarray(mask.any(axis=-1))
    np.testing.assert_allclose(found[seeing], wanted[seeing], atol=2e-6)
    for one, other in zip(gradients, others):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_window_saves_the_operations_of_what_nobody_sees():
    """Of 8,192 keys, a query of a window of 512 sees at most 512, and of a block of 512 queries at
    most 1,024 are read."""
    length = 8192
    shape = jax.ShapeDtypeStruct((1, length, 1, H), jnp.float32)
    keys = jax.ShapeDtypeStruct((1, 1, length, H), jnp.float32)
    seen = jax.ShapeDtypeStruct((1, length, length), bool)

    def operations(window):
        def both(q, k, v, m):
            way = jax.vjp(lambda *x: attend(*x, m, scale=1.0, causal=True, window=window), q, k, v)
            return way[1](way[0])

        return jax.jit(both).lower(shape, keys, keys, seen).cost_analysis()["flops"]

    blocks = length // 512
    whole = blocks * (blocks + 1) / 2  # squares of 512 keys that a causal layer computes
    near = 2 * blocks - 1  # those that a window leaves of them
    assert operations(512) / operations(None) == pytest.approx(near / whole, rel=0.01)


def test_half_precision_keeps_sums_exact():
    *inputs, cotangent = drawn(4, 2, jnp.bfloat16)
    exact = [array.astype(jnp.float32) for array in inputs]
    mask = masks()[True]
    cotangent = cotangent * mask.any(axis=-1)[:, :, None, None].astype(jnp.bfloat16)
    found, gradients = both_ways(
        lambda *x: attend(*x, mask, scale=0.4, causal=True), inputs, cotangent
    )
    wanted, others = both_ways(
        lambda *x: formula(*x, mask, 0.4, None, None), exact, cotangent.astype(jnp.float32)
    )
    assert found.dtype == jnp.bfloat16
    for one, other in [(found[:, 10:], wanted[:, 10:]), *zip(gradients, others)]:
        error = np.abs(np.asarray(one, np.float32) - np.asarray(other))
        # Eight bits of mantissa; some of the results are sums of many.
        assert error.mean() < 0.004 * np.abs(np.asarray(other)).mean() + 1e-4
        assert error.max() < 0.02 * np.abs(np.asarray(other)).max()


def test_a_layer_keeps_nothing_that_grows_with_the_square_of_the_length():
    def kept(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, H), jnp.float32)
        keys = jax.ShapeDtypeStruct((1, 2, length, H), jnp.float32)
        seen = jax.ShapeDtypeStruct((1, length, length), bool)
        _, way_back = jax.eval_shape(
            lambda q, k, v, m: jax.vjp(lambda *x: attend(*x, m, scale=1.0, causal=True), q, k, v),
            *(shape, keys, keys, seen),
        )
        floats = [x for x in jax.tree.leaves(way_back) if x.dtype == jnp.float32]
        return sum(x.size for x in floats)

    assert kept(2048) < 2.01 * kept(1024)
