"""What every layer of a forward pass needs besides its input: masks, positions, rows of a cache."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clustering.errors import UserError
from xelm.models.attention import Bias
from xelm.models.cache import Cache
from xelm.models.config import ModelConfig
from xelm.models.positions import alibi_slopes, rope_angles

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

    def view(self, local: Bool[Array, ""]) -> View:
        """The view of a layer."""
        if self.local_view is None:
            return self.global_view
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


def of_cached(config: ModelConfig, tokens: Int[Array, "B T"], cache: Cache) -> Context:
    """The context of tokens that follow those in the rows of a cache, in order."""
    positions = cache.length[:, None] + jnp.arange(tokens.shape[1])[None]
    slots = jnp.arange(cache.keys[0].shape[2])
    mask = slots[None, None] <= positions[..., None]
    every_slot = jnp.broadcast_to(slots[None], mask[:, 0].shape)
    return _context(config, mask, positions, every_slot)


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
