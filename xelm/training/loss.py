"""Cross-entropy for very large vocabularies, computed for a chunk of positions at a time."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from xelm.models.head import Head, in_chunks

_POSITIONS, _VOCABULARY = ("data",), ("fsdp", "tensor")
"""Mesh axes over which positions and the vocabulary are spread."""
_ROWS, _ENTRIES = PartitionSpec((*_POSITIONS, "fsdp")), PartitionSpec(_VOCABULARY)


@jax.named_scope("loss")
def cross_entropy(
    states: Float[Array, "*B D"],
    head: Head,
    targets: Int[Array, "*B"],
    weights: Float[Array, "*B"],
    *,
    spread: bool = False,
) -> Float[Array, ""]:
    """Sum over positions of weight * -log p(target), in nats. [*B, V] never exists in memory.

    The gradient is computed chunk by chunk together with the loss, so that the backward pass need
    not compute the logits again. Differentiable in `states` and `head`; `weights` (0 or 1, say) are
    constants.

    spread: whether to compute over the mesh that is set: positions over its axis `data`, the
    vocabulary over `fsdp` and `tensor` (as in Megatron-LM: Shoeybi et al. 2019, arXiv 1909.08053,
    section 3). data x fsdp must divide the first dimension of `states`.
    """
    flat = states.reshape(-1, states.shape[-1])
    constant = jax.lax.stop_gradient(weights.reshape(-1))
    return _summed(spread, flat, head, targets.reshape(-1), constant)


@jax.named_scope("loss")
def token_losses(
    states: Float[Array, "*B D"], head: Head, targets: Int[Array, "*B"], *, spread: bool = False
) -> Float[Array, "*B"]:
    """-log p(target) at each position, in nats; as `cross_entropy`, but without a gradient."""
    flat, wanted = states.reshape(-1, states.shape[-1]), targets.reshape(-1)
    found = (_losses_over_mesh if spread else _losses_of_part)(flat, head, wanted)
    return found.reshape(targets.shape)


def _losses_of_part(states, head, targets, first=0, size=None, across=()):
    entries = first + jnp.arange(head.matrix.shape[0])

    def chunk(inputs):
        part, wanted = inputs
        return _softmax(part, wanted, head, entries, size, across)[-1]

    losses = jax.lax.map(chunk, in_chunks(head.matrix.shape[0], states, targets))
    return losses.reshape(-1)[: states.shape[0]]


def _losses_over_mesh(states, head, targets):
    def part(states, head, targets):
        positions = len(targets)
        states, targets = (jax.lax.all_gather(x, "fsdp", tiled=True) for x in (states, targets))
        first = jax.lax.axis_index(_VOCABULARY) * head.matrix.shape[0]
        losses = _losses_of_part(states, head, targets, first, size, _VOCABULARY)
        own = jax.lax.axis_index("fsdp") * positions
        return jax.lax.dynamic_slice_in_dim(losses, own, positions)

    size, padded = head.matrix.shape[0], _padded(head, states.dtype)
    return jax.shard_map(
        part,
        in_specs=(_ROWS, _ENTRIES, _ROWS),
        out_specs=_ROWS,
        axis_names={*_POSITIONS, *_VOCABULARY},
        check_vma=False,
    )(states, padded, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(spread, states, head, targets, weights):
    return _forward(spread, states, head, targets, weights)[0]


def _forward(spread, states, head, targets, weights):
    if not spread:
        loss, gradients = _loss_of_part(states, head, targets, weights)
    else:
        loss, gradients = _loss_over_mesh(states, head, targets, weights)
    state_gradient, head_gradient = gradients
    like = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), head_gradient, head)
    # Both at once, or XLA would keep the head's in float32 during the whole backward pass.
    return loss, jax.lax.optimization_barrier((state_gradient.astype(states.dtype), like))


def _loss_of_part(states, head, targets, weights, first=0, size=None, across=()):
    """The loss, and its gradients by states and head.

    `head` may be a part of the vocabulary: entries from `first` on, of which those at `size` and
    above are no tokens. The other parts lie on other devices `across` these mesh axes, and the
    gradient by states is that of this part only.
    """
    entries = first + jnp.arange(head.matrix.shape[0])

    def chunk(head_gradient, inputs):
        part, wanted, weight = inputs
        logits, hot, scaled, total, losses = _softmax(part, wanted, head, entries, size, across)
        loss = (losses * weight).sum()
        error = (scaled / total - hot) * weight[:, None]
        if head.cap is not None:
            # The slope of tanh; 0 where there is no token.
            error = error * (1 - jnp.square(jnp.maximum(logits, -head.cap) / head.cap))
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
    chunks = in_chunks(head.matrix.shape[0], states, targets, weights)
    head_gradient, (losses, state_gradients) = jax.lax.scan(chunk, zero, chunks)
    state_gradient = state_gradients.reshape(-1, states.shape[1])[: states.shape[0]]
    return losses.sum(), (state_gradient, head_gradient)


def _softmax(part, wanted, head, entries, size, across):
    """Logits of a chunk of positions, which of them are those of the targets, their exponentials,
    the sums of these, and the loss of each position. Arguments as in `_loss_of_part`; entries: the
    numbers of the vocabulary in `head`."""
    logits = head.logits(part)
    if size is not None:
        logits = jnp.where((entries < size)[None], logits, jnp.finfo(jnp.float32).min)
    top = jax.lax.pmax(logits.max(axis=-1, keepdims=True), across)
    scaled = jnp.exp(logits - top)
    # Not by a gather: XLA's partitioner fails at arrays that are spread over several axes.
    hot = wanted[:, None] == entries[None]
    chosen = jnp.where(hot, logits, 0.0).sum(axis=-1, keepdims=True)
    total, chosen = jax.lax.psum((scaled.sum(axis=-1, keepdims=True), chosen), across)
    return logits, hot, scaled, total, (top + jnp.log(total) - chosen)[:, 0]


def _loss_over_mesh(states, head, targets, weights):
    size, padded = head.matrix.shape[0], _padded(head, states.dtype)

    def part(states, head, targets, weights):
        # The vocabulary is split over `fsdp`, so each device needs the positions of all of these.
        every = [jax.lax.all_gather(x, "fsdp", tiled=True) for x in (states, targets, weights)]
        first = jax.lax.axis_index(_VOCABULARY) * head.matrix.shape[0]
        states, targets, weights = every
        loss, (state_gradient, head_gradient) = _loss_of_part(
            states, head, targets, weights, first, size, _VOCABULARY
        )
        state_gradient = jax.lax.psum(state_gradient, "tensor")
        state_gradient = jax.lax.psum_scatter(state_gradient, "fsdp", tiled=True)
        loss, head_gradient = jax.lax.psum((loss, head_gradient), _POSITIONS)
        return loss, (state_gradient, head_gradient)

    loss, (state_gradient, head_gradient) = jax.shard_map(
        part,
        in_specs=(_ROWS, _ENTRIES, _ROWS, _ROWS),
        out_specs=(PartitionSpec(), (_ROWS, _ENTRIES)),
        axis_names={*_POSITIONS, *_VOCABULARY},
        check_vma=False,
    )(states, padded, targets, weights)
    return loss, (state_gradient, jax.tree.map(lambda x: x[:size], head_gradient))


def _padded(head, dtype):
    """The head in a dtype, with entries that are no tokens to fill the last part of a vocabulary of
    any size."""
    mesh = jax.sharding.get_abstract_mesh()
    missing = -head.matrix.shape[0] % (mesh.shape["fsdp"] * mesh.shape["tensor"])
    return jax.tree.map(
        lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)),
        replace(head, matrix=head.matrix.astype(dtype)),
    )


def _backward(spread, gradients, cotangent):
    scale = cotangent.astype(jnp.float32)
    scaled = jax.tree.map(lambda gradient: (gradient * scale).astype(gradient.dtype), gradients)
    return (*scaled, None, None)


_summed.defvjp(_forward, _backward)
