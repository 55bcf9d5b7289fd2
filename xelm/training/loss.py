"""Cross-entropy, and the divergence from a teacher, for very large vocabularies: computed for a
chunk of positions at a time."""

import functools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from xelm.models.head import Head, in_chunks
from xelm.training.sharding import RULES

_POSITIONS, _VOCABULARY = ("data",), ("fsdp", "tensor")
"""Mesh axes over which positions and the vocabulary are spread."""
_ROWS, _ENTRIES = PartitionSpec((*_POSITIONS, "fsdp")), PartitionSpec(_VOCABULARY)
_COLUMNS = PartitionSpec(None, RULES["columns"])


@jax.named_scope("loss")
def cross_entropy(
    states: Float[Array, "*B D"],
    head: Head,
    targets: Int[Array, "*B"],
    weights: Float[Array, "*B"],
    *,
    spread: bool = False,
    frozen_head: bool = False,
) -> Float[Array, ""]:
    """Sum over positions of weight * -log p(target), in nats. [*B, V] never exists in memory.

    The gradient is computed chunk by chunk together with the loss, so that the backward pass need
    not compute the logits again. Differentiable in `states` and `head`; `weights` (0 or 1, say) are
    constants.

    spread: whether to compute over the mesh that is set: positions over its axis `data`, the
    vocabulary over `fsdp` and `tensor` (as in Megatron-LM: Shoeybi et al. 2019, arXiv 1909.08053,
    section 3). data x fsdp must divide the first dimension of `states`.

    frozen_head: whether the head is a constant too, by which no gradient is computed.
    """
    return _sum((spread, frozen_head), states, head, targets, weights, None)


class Teacher(NamedTuple):
    """A teacher's predictions at some positions."""

    ids: Int[Array, "*B n"]
    """Its n likeliest tokens, all different."""
    log_probabilities: Float[Array, "*B n"]
    """Their log probabilities; what their probabilities leave to 1 is that of all other tokens."""
    share: Float[Array, "*B"]
    """Weight of the divergence from the teacher; the cross-entropy has the rest to 1."""


@jax.named_scope("loss")
def distillation(
    states: Float[Array, "*B D"],
    head: Head,
    targets: Int[Array, "*B"],
    weights: Float[Array, "*B"],
    teacher: Teacher,
    *,
    spread: bool = False,
    frozen_head: bool = False,
) -> Float[Array, ""]:
    """Sum over positions of weight * ((1 - share) * -log q(target) + share * KL), in nats.

    KL is the forward divergence of the student q from the teacher p, with all tokens but the
    teacher's n likeliest in one bin: sum_i p_i log(p_i / q_i) + r log(r / s), with r = 1 - sum_i
    p_i and s = 1 - sum_i q_i. It is 0 where both agree on the n probabilities, and never above the
    divergence over the vocabulary, whose first term it is in Dasgupta et al. 2026 (arXiv
    2602.20816); with n = V it is that. The mixture with the cross-entropy is that of Hinton et al.
    2015 (arXiv 1503.02531), in pre-training as in Peng et al. 2024 (arXiv 2410.16215).

    By the logits the gradient is q - (1 - share) [target] - share * t, where t is p on the n tokens
    and r q / s on all others. Memory and the other arguments are as in `cross_entropy`."""
    return _sum((spread, frozen_head), states, head, targets, weights, teacher)


def _sum(form, states, head, targets, weights, teacher):
    def flat(array):
        return array.reshape(-1, *array.shape[targets.ndim :])

    constants = jax.lax.stop_gradient((weights, teacher))
    return _summed(form, flat(states), head, flat(targets), *jax.tree.map(flat, constants))


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

    losses = jax.lax.map(chunk, in_chunks(head, states, targets))
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
def _summed(form, states, head, targets, weights, teacher):
    return _forward(form, states, head, targets, weights, teacher)[0]


def _forward(form, states, head, targets, weights, teacher):
    spread, frozen_head = form
    compute = _loss_over_mesh if spread else _loss_of_part
    loss, gradients = compute(states, head, targets, weights, teacher, frozen_head=frozen_head)
    state_gradient, like = gradients
    if not frozen_head:
        like = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), like, head)
    # Both at once, or XLA would keep the head's in float32 during the whole backward pass.
    return loss, jax.lax.optimization_barrier((state_gradient.astype(states.dtype), like))


def _loss_of_part(
    states, head, targets, weights, teacher, first=0, size=None, across=(), *, frozen_head=False
):
    """The loss, and its gradients by states and head (None for a frozen one).

    `head` may be a part of the vocabulary: entries from `first` on, of which those at `size` and
    above are no tokens. The other parts lie on other devices `across` these mesh axes, and the
    gradient by states is that of this part only.
    """
    entries = first + jnp.arange(head.matrix.shape[0])

    def chunk(head_gradient, inputs):
        part, wanted, weight, *predicted = inputs
        logits, hot, scaled, total, losses = _softmax(part, wanted, head, entries, size, across)
        likely = scaled / total
        if predicted:
            losses, hot = _taught(Teacher(*predicted), losses, hot, likely, first, size, across)
        loss = (losses * weight).sum()
        error = (likely - hot) * weight[:, None]
        if head.cap is not None:
            # The slope of tanh; 0 where there is no token.
            error = error * (1 - jnp.square(jnp.maximum(logits, -head.cap) / head.cap))
        if head.scale != 1.0:
            error = error * head.scale
        if frozen_head:
            error = error.astype(part.dtype)
            return None, (loss, error @ head.matrix.astype(part.dtype))
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
    zero = None if frozen_head else zero
    chunks = in_chunks(head, states, targets, weights, *(teacher or ()))
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


def _taught(teacher, losses, hot, likely, first, size, across):
    """The losses of a chunk of positions with their divergence from a teacher, and what the model's
    probabilities, `likely`, are to become there. The other arguments are as in `_loss_of_part`; of
    `losses` and `hot`, those of the targets."""
    count, vocabulary = teacher.ids.shape[-1], size or likely.shape[-1]
    top = jnp.exp(teacher.log_probabilities.astype(jnp.float32))
    total = top.sum(axis=-1, keepdims=True)
    # Rounded values may sum to more than 1; those of all tokens do sum to 1.
    top = top / (total if count == vocabulary else jnp.maximum(total, 1))
    rest = jnp.maximum(1 - top.sum(axis=-1, keepdims=True), 0)
    rest = jnp.zeros_like(rest) if count == vocabulary else rest
    # Of the tokens on other devices, which are dropped, none may count from the end.
    places = teacher.ids - first
    places = jnp.where(places < 0, likely.shape[-1], places)
    rows = jnp.arange(len(likely))[:, None]
    wanted = jnp.zeros_like(likely).at[rows, places].set(top, mode="drop")
    named = jnp.zeros(likely.shape, bool).at[rows, places].set(True, mode="drop")
    least = jnp.finfo(jnp.float32).tiny
    others = jax.lax.psum(jnp.where(named, 0, likely).sum(axis=-1, keepdims=True), across)
    others = jnp.maximum(others, least)
    crossed = jnp.where(named, wanted * jnp.log(jnp.maximum(likely, least)), 0).sum(axis=-1)
    divergence = xlogy(top, top).sum(axis=-1) + xlogy(rest, rest / others)[:, 0]
    divergence = divergence - jax.lax.psum(crossed, across)
    wanted = jnp.where(named, wanted, rest * likely / others)
    share = teacher.share.astype(jnp.float32)
    hot = (1 - share[:, None]) * hot + share[:, None] * wanted
    return (1 - share) * losses + share * divergence, hot


def _loss_over_mesh(states, head, targets, weights, teacher, *, frozen_head):
    size, padded = head.matrix.shape[0], _padded(head, states.dtype)
    dtypes = jax.tree.map(lambda x: x.dtype, head)

    def part(states, head, *others):
        # The vocabulary is split over `fsdp`, so each device needs the positions of all of these.
        states, targets, weights, *teacher = (
            jax.lax.all_gather(x, "fsdp", tiled=True) for x in (states, *others)
        )
        first = jax.lax.axis_index(_VOCABULARY) * head.matrix.shape[0]
        constants = targets, weights, teacher, first, size, _VOCABULARY
        loss, (state_gradient, head_gradient) = _loss_of_part(
            states, head, *constants, frozen_head=frozen_head
        )
        state_gradient = jax.lax.psum(state_gradient, "tensor")
        state_gradient = jax.lax.psum_scatter(state_gradient, "fsdp", tiled=True)
        if not frozen_head:
            # It is summed in float32 on each device, and need not pass between them so.
            head_gradient = jax.tree.map(lambda x, t: x.astype(t), head_gradient, dtypes)
        loss, head_gradient = jax.lax.psum((loss, head_gradient), _POSITIONS)
        return loss, (state_gradient, head_gradient)

    loss, (state_gradient, head_gradient) = jax.shard_map(
        part,
        in_specs=(_ROWS, _ENTRIES, *[_ROWS] * (2 + len(teacher or ()))),
        out_specs=(PartitionSpec(), (_ROWS, _ENTRIES)),
        axis_names={*_POSITIONS, *_VOCABULARY},
        check_vma=False,
    )(states, padded, targets, weights, *(teacher or ()))
    head_gradient = jax.tree.map(lambda x: x[:size], head_gradient)
    if not frozen_head:
        # Spread as the table is, and as the gradient of its look-ups, which is added to it.
        columns = jax.lax.with_sharding_constraint(head_gradient.matrix, _COLUMNS)
        head_gradient = replace(head_gradient, matrix=columns)
    return loss, (state_gradient, head_gradient)


def _padded(head, dtype):
    """The head in a dtype, with entries that are no tokens to fill the last part of a vocabulary of
    any size."""
    mesh = jax.sharding.get_abstract_mesh()
    missing = -head.matrix.shape[0] % (mesh.shape["fsdp"] * mesh.shape["tensor"])
    return jax.tree.map(
        lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)),
        replace(head, matrix=head.matrix.astype(dtype)),
    )


def _backward(form, gradients, cotangent):
    scale = cotangent.astype(jnp.float32)
    scaled = jax.tree.map(lambda gradient: (gradient * scale).astype(gradient.dtype), gradients)
    return (*scaled, None, None, None)


_summed.defvjp(_forward, _backward)
