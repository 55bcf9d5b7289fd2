"""What every layer of a forward pass needs besides its input: masks, positions, rows of a cache."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clustering.errors import UserError
from xelm.models.attention import Bias
from xelm.models.cache import Cache, ring_slots
from xelm.models.config import ModelConfig
from xelm.models.positions import alibi_slopes, rope_angles
from xelm.models.target import CPU, Target

Fused = Callable[[Array, Array, Array, Array], Array]
"""(query [B, T, N, H], key [B, T, K, H], value [B, T, K, H], whether the layer is local [])
-> [B, T, N, H]"""


class View(NamedTuple):
    """What tokens see in one kind of layer, global or local, and their rotary angles."""

    mask: Bool[Array, "B T S"]
    rope: tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]] | None
    """Cosines and sines; None if the model has no rotary positions."""


@dataclass(frozen=True)
class Context:
    """What is the same for all layers of one forward pass."""

    positions: Int[Array, "B T"]
    global_view: View
    local_view: View | None
    """None if no layer is local."""
    bias: Bias | None
    """Linear biases of scores (ALiBi); None if the model has none."""
    fused: Fused | None = None
    """Attention by a kernel of the device; None where the device has none for this."""
    target: Target = CPU
    """The kind of device that the program is compiled for."""
    ring: int | None = None
    """Number of slots of local layers, where their caches are rings."""

    def view(self, local: Bool[Array, ""] | bool) -> View:
        """The view of a layer; whether it is local is known while the program is made if it has a
        cache."""
        if self.local_view is None or local is False:
            return self.global_view
        if local is True:
            return self.local_view
        return jax.tree.map(partial(jnp.where, local), self.local_view, self.global_view)


def of_sequences(
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None,
    segments: Int[Array, "B T"] | None,
    valid: Bool[Array, "B T"] | None,
) -> Context:
    """The context of sequences that are read as a whole; arguments as in `Transformer.hidden`."""
    if config.rope.scaling == "longrope" and tokens.shape[1] > config.max_length:
        raise UserError(
            f"this model is computed for at most {config.max_length} tokens, since beyond them "
            f"longrope has other frequencies; got {tokens.shape[1]}"
        )
    mask = jnp.ones((*tokens.shape, tokens.shape[1]), bool)
    if config.causal:
        mask = jnp.tril(mask)
    if valid is not None:
        mask = mask & valid[:, None, :]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    if positions is None and valid is not None and config.positions_skip_padding:
        positions = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
    elif positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return _context(config, mask, positions, positions)


def of_cached(
    config: ModelConfig, tokens: Int[Array, "B T"], cache: Cache, target: Target = CPU
) -> Context:
    """The context of tokens that follow those in the rows of a cache, in order."""
    positions = cache.length[:, None] + jnp.arange(tokens.shape[1])[None]
    count = max(keys.shape[2] for keys in cache.keys)
    slots = jnp.arange(count)
    mask = slots[None, None] <= positions[..., None]
    every_slot = jnp.broadcast_to(slots[None], mask[:, 0].shape)
    context = replace(_context(config, mask, positions, every_slot), target=target)
    ring = ring_slots(config)
    stores = {cache.keys[number].shape[2] for number in config.local_layers}
    if ring is None or stores != {ring} or context.local_view is None:
        return context
    assert config.local_window is not None
    if tokens.shape[1] > ring - config.local_window + 1:
        raise ValueError(
            f"at most {ring - config.local_window + 1} tokens can be added to rings of {ring} "
            f"slots at once; got {tokens.shape[1]}"
        )
    # What lies in each slot once all new tokens are stored; before the first tokens, nothing does.
    last = positions[:, -1:]
    stored = last - (last - jnp.arange(ring)[None]) % ring
    distance = positions[:, :, None] - stored[:, None, :]
    seen = (stored[:, None, :] >= 0) & (distance >= 0) & (distance < config.local_window)
    return replace(context, local_view=context.local_view._replace(mask=seen), ring=ring)


def _context(config, mask, positions, key_positions):
    rope, bias, local = None, None, None
    if config.positions == "rope":
        rope = rope_angles(positions, config.rope, config.head_size)
    if config.positions == "alibi":
        bias = Bias(jnp.asarray(alibi_slopes(config.head_count)), key_positions)
    if config.local_window is not None:
        local_rope = rope
        if config.local_rope is not None:
            local_rope = rope_angles(positions, config.local_rope, config.head_size)
        distance = jnp.abs(positions[:, :, None] - key_positions[:, None, :])
        local = View(mask & (distance < config.local_window), local_rope)
    return Context(positions, View(mask, rope), local, bias)
