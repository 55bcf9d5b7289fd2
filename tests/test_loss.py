"""The chunked cross-entropy: optax's values and gradients, without optax's memory."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import scipy.special

from xelm.models import head as output_head
from xelm.models.head import Head, positions_in_a_chunk, target_log_probabilities
from xelm.models.target import CPU, GIB, Target
from xelm.training.loss import cross_entropy

WIDTH = 12


def inputs(positions: int, vocabulary: int, dtype=np.float32, *, bias=False, cap=None, scale=1.0):
    draw = np.random.default_rng(0)
    matrix = draw.normal(size=(vocabulary, WIDTH)).astype(np.float32)
    return (
        draw.normal(size=(positions, WIDTH)).astype(dtype),
        Head(
            matrix,
            draw.normal(size=vocabulary).astype(np.float32) if bias else None,
            cap,
            scale=scale,
        ),
        draw.integers(0, vocabulary, positions),
        draw.uniform(size=positions).astype(np.float32),
    )


def with_gradients(function):
    """Compiled anew, since the size of a chunk is read while compiling."""
    return jax.jit(jax.value_and_grad(lambda *arguments: function(*arguments), argnums=(0, 1)))


def reference(hidden, head, targets, weights):
    """In float32, all logits at once."""
    logits = hidden.astype(jnp.float32) @ head.matrix.T
    logits = logits if head.bias is None else logits + head.bias[None]
    logits = logits * head.scale
    logits = logits if head.cap is None else head.cap * jnp.tanh(logits / head.cap)
    return (optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights).sum()


def assert_close(gradients, references):
    def check(gradient, other):
        assert gradient.dtype == other.dtype == jnp.float32
        np.testing.assert_allclose(gradient, other, atol=1e-5, rtol=1e-5)

    jax.tree.map(check, gradients, references)


# Chunks of 64 positions, the least there is: one short, one full, several with a remainder.
SHAPES = [(1, 50), (64, 50), (333, 97)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(output_head, "LOGITS_IN_A_CHUNK", 64)


@pytest.mark.parametrize(("positions", "vocabulary"), SHAPES)
def test_the_loss_and_its_gradients_equal_those_of_optax(positions, vocabulary):
    arguments = inputs(positions, vocabulary)
    found, gradients = with_gradients(cross_entropy)(*arguments)
    wanted, references = with_gradients(reference)(*arguments)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert_close(gradients, references)


def test_a_frozen_head_gives_the_same_gradient_by_states_and_needs_none_of_its_own():
    vocabulary = 1000
    arguments = inputs(100, vocabulary, bias=True, cap=2.0)
    frozen = functools.partial(cross_entropy, frozen_head=True)
    made = {name: with_gradients(loss) for name, loss in (("all", cross_entropy), ("head", frozen))}
    (one, (states, _)), (other, (found, head)) = (each(*arguments) for each in made.values())
    assert one == other
    np.testing.assert_array_equal(found, states)
    assert not np.asarray(head.matrix).any() and not np.asarray(head.bias).any()

    def products_of_its_shape(loss):
        # Before the compiler, which finds on a CPU that nobody uses them.
        text = jax.jit(jax.grad(loss)).lower(*arguments).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        return sum(f"-> tensor<{vocabulary}x{WIDTH}xf32>" in line for line in products)

    assert (products_of_its_shape(cross_entropy), products_of_its_shape(frozen)) == (1, 0)


@pytest.mark.parametrize(
    ("bias", "cap", "scale"),
    [(True, None, 1.0), (False, 2.0, 1.0), (True, 2.0, 1.0), (False, None, 0.3), (True, 2.0, 0.3)],
)
def test_a_bias_a_scale_and_a_cap_of_logits_do_as_in_all_logits(bias, cap, scale):
    arguments = inputs(100, 97, bias=bias, cap=cap, scale=scale)
    found, gradients = with_gradients(cross_entropy)(*arguments)
    wanted, references = with_gradients(reference)(*arguments)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert_close(gradients, references)
    hidden, head, targets, _ = arguments
    scores = jax.jit(target_log_probabilities)(hidden, head, targets)
    np.testing.assert_allclose(-scores.sum(), reference(hidden, head, targets, 1.0), rtol=1e-5)


def test_batches_of_rows_give_what_their_positions_give_side_by_side():
    hidden, head, targets, weights = inputs(3 * 50, 97)
    rows = (hidden.reshape(3, 50, WIDTH), head, targets.reshape(3, 50))
    scores = jax.jit(target_log_probabilities)
    np.testing.assert_array_equal(scores(*rows), scores(hidden, head, targets).reshape(3, 50))
    found = with_gradients(cross_entropy)(*rows, weights.reshape(3, 50))
    wanted = with_gradients(cross_entropy)(hidden, head, targets, weights)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.reshape(a.shape)), found, wanted)


@pytest.mark.parametrize(("positions", "vocabulary"), SHAPES)
def test_log_probabilities_of_targets_equal_those_of_all_logits(positions, vocabulary):
    hidden, head, targets, _ = inputs(positions, vocabulary)
    scores = jax.jit(target_log_probabilities)(hidden, head, targets)
    wanted = scipy.special.log_softmax(hidden @ head.matrix.T, axis=1)[
        np.arange(positions), targets
    ]
    np.testing.assert_allclose(scores, wanted, atol=1e-5, rtol=1e-5)


def test_the_size_of_chunks_does_not_matter(monkeypatch):
    arguments = inputs(333, 97)
    values = []
    for logits_in_a_chunk in (64, 100 * 97, 2**22):
        monkeypatch.setattr(output_head, "LOGITS_IN_A_CHUNK", logits_in_a_chunk)
        values.append(with_gradients(cross_entropy)(*arguments))
    for value in values[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), *values[:1], value
        )


def test_chunks_of_a_cpu_stay_near_its_caches(monkeypatch):
    """16 MiB of logits, but at least 64 positions; in no way do they depend on the number."""
    monkeypatch.undo()  # chunks as they are
    assert [positions_in_a_chunk(n, 256_008, CPU) for n in (10, 100, 2048)] == [10, 64, 64]
    assert [positions_in_a_chunk(n, 8192, CPU) for n in (100, 2048)] == [100, 512]


@pytest.mark.parametrize("vocabulary", [1000, 32_000, 151_936, 256_008, 1_000_000])
@pytest.mark.parametrize("gib", [8, 16, 32, 95])
@pytest.mark.parametrize("positions", [100, 2048, 5000, 16 * 2048])
def test_chunks_of_an_accelerator_fill_its_matrix_units_within_its_memory(
    vocabulary, gib, positions
):
    size = positions_in_a_chunk(positions, vocabulary, Target("tpu", gib * GIB))
    assert size == positions or size % 256 == 0
    assert size <= 2048
    # At 1,000,000 entries, 256 positions are a gigabyte whatever there is.
    assert 4 * size * vocabulary <= gib * GIB / 8 or size == min(positions, 256)
    # The last chunk is not empty by more than one multiple for each chunk.
    chunks = -(-positions // size)
    assert chunks * size - positions < 256 * chunks


def test_the_chunk_of_a_v5e_for_the_vocabulary_of_xglm():
    chip = Target("tpu", 16 * GIB)
    assert positions_in_a_chunk(2048, 256_008, chip) == 2048
    assert positions_in_a_chunk(2560, 256_008, chip) == 1280  # two, rather than 2,048 and 512
    assert positions_in_a_chunk(2048, 500_000, chip) == 1024
    assert positions_in_a_chunk(16 * 2048, 32_000, chip) == 2048


def test_the_loss_in_the_chunks_of_an_accelerator_equals_that_of_a_cpu(monkeypatch):
    hidden, head, targets, weights = inputs(1200, 97, bias=True, cap=2.0)
    found = []
    for target in (CPU, Target("tpu", 16 * GIB), Target("tpu", 2**18)):
        head = replace(head, target=target)
        with_scores = jax.jit(target_log_probabilities)(hidden, head, targets)
        loss, (states, own) = with_gradients(cross_entropy)(hidden, head, targets, weights)
        found.append((loss, states, own.matrix, own.bias, with_scores))
    sizes = {positions_in_a_chunk(1200, 97, t) for t in (CPU, Target("tpu", 16 * GIB))}
    assert len(sizes) == 2
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_allclose(one, two, rtol=2e-6, atol=2e-6)


def test_positions_without_weight_count_nothing():
    hidden, head, targets, weights = inputs(100, 50)
    weights[30:] = 0.0
    grad = with_gradients(cross_entropy)
    found, (of_hidden, of_head) = grad(hidden, head, targets, weights)
    wanted, (short_hidden, short_head) = grad(hidden[:30], head, targets[:30], weights[:30])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(of_head.matrix, short_head.matrix, atol=1e-6)
    np.testing.assert_allclose(of_hidden[:30], short_hidden, atol=1e-6)
    assert not np.asarray(of_hidden[30:]).any()


def test_the_gradient_carries_the_factor_of_what_follows():
    arguments = inputs(64, 50)
    _, plain = with_gradients(cross_entropy)(*arguments)
    _, scaled = with_gradients(lambda *given: -3.0 * cross_entropy(*given))(*arguments)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(other, -3.0 * one, rtol=1e-6), plain, scaled
    )


def test_weights_are_constants():
    gradient = jax.jit(jax.grad(cross_entropy, argnums=3))(*inputs(64, 50))
    assert not np.asarray(gradient).any()


def test_huge_logits_do_not_overflow():
    hidden, head, targets, weights = inputs(64, 50)
    arguments = (np.float32(1e4) * hidden, head, targets, weights)
    found, (gradient, _) = with_gradients(cross_entropy)(*arguments)
    wanted, (other, _) = with_gradients(reference)(*arguments)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradient, other, atol=1e-4)


def test_half_precision_is_close_to_the_rounded_inputs_in_full():
    hidden, head, targets, weights = inputs(200, 97, jnp.bfloat16)
    rounded = Head(head.matrix.astype(jnp.bfloat16).astype(jnp.float32), None)
    grad = with_gradients(cross_entropy)
    found, (of_hidden, of_head) = grad(hidden, head, targets, weights)
    wanted, (reference_hidden, reference_head) = with_gradients(reference)(
        hidden.astype(jnp.float32), rounded, targets, weights
    )
    assert (of_hidden.dtype, of_head.matrix.dtype) == (jnp.bfloat16, jnp.float32)
    # Products of bfloat16 are summed in float32: the loss is exact for the rounded inputs.
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    # The error signal is rounded to eight bits, which is 2^-9 of each of its values.
    pairs = ((of_hidden, reference_hidden), (of_head.matrix, reference_head.matrix))
    for gradient, other in pairs:
        error = np.linalg.norm(np.asarray(gradient, np.float32) - other) / np.linalg.norm(other)
        assert error < 2**-8


def test_a_large_vocabulary_never_has_all_its_logits_in_memory(monkeypatch):
    monkeypatch.undo()  # chunks as they are
    positions, vocabulary = 4096, 256_008  # of XGLM
    shapes = (
        jax.ShapeDtypeStruct((positions, WIDTH), jnp.float32),
        Head(jax.ShapeDtypeStruct((vocabulary, WIDTH), jnp.float32), None),
        jax.ShapeDtypeStruct((positions,), jnp.int32),
        jax.ShapeDtypeStruct((positions,), jnp.float32),
    )
    whole = positions * vocabulary * 4

    def bytes_of(function):
        compiled = jax.jit(function).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_of(jax.grad(reference, argnums=(0, 1))) > whole
    assert bytes_of(jax.grad(cross_entropy, argnums=(0, 1))) < whole / 20
    assert bytes_of(cross_entropy) < whole / 20


def test_shapes_are_held_to_their_annotations():
    hidden, head, targets, weights = inputs(64, 50)
    for arguments in ((hidden[:, 1:], head, targets, weights), (hidden, head, targets, targets)):
        with pytest.raises(jaxtyping.TypeCheckError):
            cross_entropy(*arguments)
