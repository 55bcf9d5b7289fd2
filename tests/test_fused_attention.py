"""Fused kernels of devices give the attention of the reference, for what they are chosen for."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_training import MODEL

from xelm.models.attention import attend
from xelm.models.fused_attention import Form, fused_attention, on_gpu, on_one_device, on_tpu
from xelm.models.target import CPU, GIB, Target
from xelm.models.tpu_attention import Kernel
from xelm.training.lookups import on_own_rows
from xelm.training.sharding import mesh_of_devices

B, T, N, H = 2, 384, 4, 64  # three blocks of 128, and two heads in 128 columns
TPU, GPU = Target("tpu", 16 * GIB), Target("gpu", 16 * GIB)
V4 = Target("tpu", 32 * GIB, 2**24)
DECODER = replace(MODEL, head_size=H)
LOCAL = {"local_window": 100, "local_layers": (0,)}


def drawn(keys, dtype=jnp.float32, size=H):
    draw = np.random.default_rng(0)
    shapes = [(B, T, N, size), (B, T, keys, size), (B, T, keys, size), (B, T, N, size)]
    return [jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes]


def segments():
    """Two documents and padding, which begin and end within blocks; and one document."""
    rows = [[1] * 150 + [2] * 210 + [0] * 24, [1] * T]
    return jnp.asarray(rows, jnp.int32)


def reference(form):
    """The same by `attend`, from the mask of all that is seen."""
    place = jnp.arange(T)
    near = jnp.abs(place[:, None] - place[None]) < (form.window or T)
    mask = segments()[:, :, None] == segments()[:, None, :]
    mask = mask & near[None] & (jnp.tril(jnp.ones((T, T), bool))[None] | (not form.causal))

    def compute(query, key, value):
        key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
        return attend(query, key, value, mask, scale=form.scale, cap=form.cap, causal=form.causal)

    return compute


def both_ways(function, inputs, cotangent):
    @jax.jit
    def run(inputs, cotangent):
        found, way_back = jax.vjp(function, *inputs)
        return found, *way_back(cotangent)

    return run(tuple(inputs), cotangent)


FORMS = {
    "causal": (Form(0.1, None, True, None), 4, H),
    "capped, in groups": (Form(0.3, 2.0, True, None), 2, H),
    "window, one key": (Form(0.1, None, True, 100), 1, H),
    "encoder": (Form(0.1, None, False, None), 4, H),
    "encoder, window": (Form(0.1, None, False, 60), 2, H),
    "a head in all columns, in groups": (Form(0.1, None, True, 200), 2, 128),
}


def interpreted(form, size, *, local=True):
    kernel = Kernel(size, form.cap, form.causal, form.window is not None, interpret=True)
    return lambda *x: on_tpu(kernel, form, *x, segments(), jnp.asarray(local))


@pytest.mark.parametrize(("form", "keys", "size"), FORMS.values(), ids=FORMS)
def test_the_kernel_for_tpus_equals_the_reference(form, keys, size):
    *inputs, cotangent = drawn(keys, size=size)
    found = both_ways(interpreted(form, size), inputs, cotangent)
    wanted = both_ways(reference(form), inputs, cotangent)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_the_kernel_for_tpus_has_no_window_in_global_layers():
    form, keys, size = FORMS["window, one key"]
    *inputs, cotangent = drawn(keys, size=size)
    found = both_ways(interpreted(form, size, local=False), inputs, cotangent)
    wanted = both_ways(reference(form._replace(window=None)), inputs, cotangent)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_the_kernel_for_tpus_keeps_sums_exact_in_half_precision():
    form, keys, size = FORMS["causal"]
    *inputs, cotangent = drawn(keys, jnp.bfloat16)
    exact = both_ways(reference(form), *jax.tree.map(jnp.float32, (inputs, cotangent)))
    found = both_ways(interpreted(form, size), inputs, cotangent)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == jnp.bfloat16
        error = np.abs(np.asarray(one, np.float32) - np.asarray(other))
        # As in the test of the reference: eight bits, and some results are sums of many.
        assert error.mean() < 0.004 * np.abs(np.asarray(other)).mean() + 1e-4
        assert error.max() < 0.02 * np.abs(np.asarray(other)).max()


@pytest.mark.parametrize("local", [True, False], ids=["local", "global"])
@pytest.mark.parametrize("name", ["causal", "window, one key", "encoder"])
def test_cudnn_is_given_what_the_reference_computes(name, local, monkeypatch):
    """By the implementation of the same function that runs everywhere: cuDNN's needs a GPU."""
    form, keys, _ = FORMS[name]
    asked, original = [], jax.nn.dot_product_attention

    def everywhere(*arrays, implementation, **options):
        asked.append(implementation)
        return original(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", everywhere)
    *inputs, cotangent = drawn(keys)
    which = jnp.asarray(local)
    found = both_ways(lambda *x: on_gpu(form, *x, segments(), which), inputs, cotangent)
    wanted = reference(form if local else form._replace(window=None))
    for one, other in zip(found, both_ways(wanted, inputs, cotangent), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    assert set(asked) == {"cudnn"}


def chosen(target, model, dtype=jnp.bfloat16, length=T):
    rows = jnp.zeros((B, length), jnp.int32)
    return fused_attention(model, target, jnp.dtype(dtype), rows, on_one_device) is not None


@pytest.mark.parametrize(
    ("target", "model", "dtype", "length", "wanted"),
    [
        (CPU, DECODER, jnp.bfloat16, T, False),
        (TPU, DECODER, jnp.bfloat16, T, True),
        (TPU, DECODER, jnp.float32, T, True),
        (TPU, DECODER, jnp.bfloat16, 200, False),
        (TPU, DECODER, jnp.float16, T, False),  # the kernel's compiler cannot load it
        (TPU, DECODER, jnp.bfloat16, 4096, True),
        (TPU, DECODER, jnp.bfloat16, 8192, False),
        (V4, DECODER, jnp.bfloat16, 2048, True),
        (V4, DECODER, jnp.bfloat16, 4096, False),
        (TPU, replace(DECODER, attention_cap=2.0, **LOCAL), jnp.bfloat16, T, True),
        (TPU, replace(DECODER, positions="alibi"), jnp.bfloat16, T, False),
        (GPU, DECODER, jnp.bfloat16, T, True),
        (GPU, DECODER, jnp.float32, T, False),
        (GPU, DECODER, jnp.bfloat16, 201, False),
        (GPU, replace(DECODER, **LOCAL), jnp.bfloat16, T, True),
        (GPU, replace(DECODER, attention_cap=2.0), jnp.bfloat16, T, False),
        (GPU, replace(DECODER, head_size=256), jnp.bfloat16, T, False),
        (TPU, replace(DECODER, head_size=256), jnp.bfloat16, T, True),
        (TPU, replace(DECODER, head_size=96), jnp.bfloat16, T, False),
        (TPU, replace(DECODER, head_count=3, key_head_count=3), jnp.bfloat16, T, False),
    ],
)
def test_kernels_are_chosen_by_device_and_by_what_layers_need(target, model, dtype, length, wanted):
    assert chosen(target, model, dtype, length) is wanted


@pytest.mark.parametrize("heads", [4, 2], ids=["heads apart", "heads together"])
def test_kernels_on_a_mesh_give_what_one_device_gives(heads):
    """Over data 2 x fsdp 2 x tensor 2; two heads of 64 are one column, which is not divided."""
    form = Form(0.1, None, True, None)
    *inputs, cotangent = (jnp.concatenate([x, x[::-1]])[:, :, :heads] for x in drawn(4))
    rows = jnp.concatenate([segments(), segments()[::-1]])
    kernel = partial(on_tpu, Kernel(H, None, True, False, interpret=True), form)
    local = jnp.asarray(False)
    alone = both_ways(lambda *x: kernel(*x, rows, local), inputs, cotangent)
    with jax.set_mesh(mesh_of_devices(np.asarray(jax.devices()).reshape(1, 2, 2, 2))):
        spread = on_own_rows(kernel)
        found = both_ways(lambda *x: spread(*x, rows, local), inputs, cotangent)
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
