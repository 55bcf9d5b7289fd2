"""Cross-entropy for very large vocabularies: logits exist only for a chunk of positions at a time.

Multilingual vocabularies are huge (XGLM: 256,008), and [B, T, V] in float32 would dwarf the model.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xelm.models.transformer import Head

# Logits of one chunk, in values: 2^22 float32 are 16 MiB, which stays near the caches of a CPU and
# is large enough for the matrix units of an accelerator.
LOGITS_IN_A_CHUNK = 2**22


def cross_entropy(
    states: Float[Array, "*B D"],
    head: Head,
    targets: Int[Array, "*B"],
    weights: Float[Array, "*B"],
) -> Float[Array, ""]:
    """Sum over positions of weight * -log p(target), in nats. Never holds [*B, V].

    The gradient is computed chunk by chunk together with the loss, so the logits are made once
    and not again for the backward pass. Differentiable in `states` and `head`; `weights` (0 or 1,
    say) are constants.
    """
    flat = states.reshape(-1, states.shape[-1])
    constant = jax.lax.stop_gradient(weights.reshape(-1))
    return _summed(flat, head, targets.reshape(-1), constant)


def target_log_probabilities(
    states: Float[Array, "*B D"], head: Head, targets: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """log p(target) at each position, in nats, chunk by chunk."""

    def chunk(inputs):
        part, wanted = inputs
        logits = head.logits(part)
        chosen = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    flat = states.reshape(-1, states.shape[-1])
    scores = jax.lax.map(chunk, _chunks(head.matrix.shape[0], flat, targets.reshape(-1)))
    return scores.reshape(-1)[: flat.shape[0]].reshape(targets.shape)


@jax.custom_vjp
def _summed(states, head, targets, weights):
    return -(target_log_probabilities(states, head, targets) * weights).sum()


def _forward(states, head, targets, weights):
    def chunk(head_gradient, inputs):
        part, wanted, weight = inputs
        logits = head.logits(part)
        top = logits.max(axis=-1, keepdims=True)
        scaled = jnp.exp(logits - top)
        total = scaled.sum(axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, wanted[:, None], axis=-1)
        loss = ((top + jnp.log(total) - chosen)[:, 0] * weight).sum()
        hot = jax.nn.one_hot(wanted, head.matrix.shape[0], dtype=jnp.float32)
        error = (scaled / total - hot) * weight[:, None]
        if head.cap is not None:
            error = error * (1 - jnp.square(logits / head.cap))  # of tanh
        bias_gradient = head_gradient.bias
        if bias_gradient is not None:
            bias_gradient = bias_gradient + error.sum(axis=0)
        error = error.astype(part.dtype)
        state_gradient = error @ head.matrix.astype(part.dtype)
        matrix_gradient = head_gradient.matrix + jnp.einsum(
            "MV,MD->VD", error, part, preferred_element_type=jnp.float32
        )
        sums = replace(head_gradient, matrix=matrix_gradient, bias=bias_gradient)
        return sums, (loss, state_gradient)

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head)
    chunks = _chunks(head.matrix.shape[0], states, targets, weights)
    head_gradient, (losses, state_gradients) = jax.lax.scan(chunk, zero, chunks)
    state_gradient = state_gradients.reshape(-1, states.shape[1])[: states.shape[0]]
    head_gradient = jax.tree.map(lambda g, x: g.astype(x.dtype), head_gradient, head)
    return losses.sum(), (state_gradient, head_gradient)


def _backward(gradients, cotangent):
    scale = cotangent.astype(jnp.float32)
    scaled = jax.tree.map(lambda gradient: (gradient * scale).astype(gradient.dtype), gradients)
    return (*scaled, None, None)


_summed.defvjp(_forward, _backward)


def _chunks(vocabulary_size, *arrays):
    """Each [M, ...] as [chunks, M / chunks, ...], zeros at the end: they carry no weight."""
    positions = arrays[0].shape[0]
    size = min(positions, max(64, LOGITS_IN_A_CHUNK // vocabulary_size))
    padding = -positions % size
    return tuple(
        jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)).reshape(-1, size, *a.shape[1:])
        for a in arrays
    )
