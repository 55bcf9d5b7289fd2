"""One decoder in flax.nnx: pre-norm blocks, stacked on a leading layer axis and scanned.

Knows arrays and nothing of files, experts or training. Dimension letters: see `xelm.models.config`.
Dense layers work on [B*T, D]: with a [B, T, D] operand XLA on CPUs computes the weight gradient on
a transposed copy and misses its fast kernels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from xelm.models.config import ModelConfig


class Cache(NamedTuple):
    """Keys and values of the positions seen so far; slot `length` is the next one to be written."""

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    valid: Bool[Array, "B S"]
    length: Int[Array, ""]


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> Cache:
    """A cache with room for `slots` positions of `batch` sequences."""
    shape = (config.layer_count, batch, slots, config.key_head_count, config.head_size)
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        valid=jnp.zeros((batch, slots), bool),
        length=jnp.zeros((), jnp.int32),
    )


class Linear(nnx.Module):
    """x @ weight + bias, stacked over layers; `axes` name its dimensions for sharding."""

    def __init__(
        self,
        layers: int,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        scale: float,
        axes: tuple[str, str],
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        weight = scale * jax.random.normal(rngs.params(), (layers, inputs, outputs), jnp.float32)
        self.weight = nnx.Param(weight.astype(dtype), axes=("layers", *axes))
        self.bias = (
            nnx.Param(jnp.zeros((layers, outputs), dtype), axes=("layers", axes[1]))
            if bias
            else None
        )

    def __call__(self, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
        y = x @ self.weight[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)[None]


class Norm(nnx.Module):
    """RMSNorm or LayerNorm, computed in float32; `layers` is None for the one before the head."""

    def __init__(self, config: ModelConfig, layers: int | None, dtype: DTypeLike):
        shape = (config.width,) if layers is None else (layers, config.width)
        axes = ("width",) if layers is None else ("layers", "width")
        self.scale = nnx.Param(jnp.ones(shape, dtype), axes=axes)
        self.bias = (
            nnx.Param(jnp.zeros(shape, dtype), axes=axes) if config.norm == "layer" else None
        )
        self.epsilon = config.norm_epsilon

    def __call__(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        h = x.astype(jnp.float32)
        if self.bias is not None:
            h = h - h.mean(axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(axis=-1, keepdims=True) + self.epsilon)
        h = h * self.scale[...].astype(jnp.float32)[None]
        if self.bias is not None:
            h = h + self.bias[...].astype(jnp.float32)[None]
        return h.astype(x.dtype)


@dataclass(frozen=True)
class _Context:
    """What every layer needs besides its input: the same for all layers of one call."""

    mask: Bool[Array, "B T S"]
    rope: tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]] | None
    slot: Int[Array, ""] | None


class Block(nnx.Module):
    """Attention and feed-forward with residuals. Holds all L layers; is called as one of them."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        layers, width = config.layer_count, config.width
        heads = config.head_count * config.head_size
        keys = config.key_head_count * config.head_size
        # 0.02 is the initialiser of GPT-2, Llama and XGLM; residual outputs shrink with depth as
        # in GPT-2, so that the variance of the residual stream does not grow with L.
        inner, outer = 0.02, 0.02 / (2 * layers) ** 0.5
        attention = {"bias": config.attention_bias, "rngs": rngs, "dtype": dtype}
        feedforward = {"bias": config.feedforward_bias, "rngs": rngs, "dtype": dtype}
        self.config = config
        self.attention_norm = Norm(config, layers, dtype)
        self.query = Linear(layers, width, heads, scale=inner, axes=("width", "heads"), **attention)
        self.key = Linear(layers, width, keys, scale=inner, axes=("width", "keys"), **attention)
        self.value = Linear(layers, width, keys, scale=inner, axes=("width", "keys"), **attention)
        self.output = Linear(
            layers, heads, width, scale=outer, axes=("heads", "width"), **attention
        )
        self.feedforward_norm = Norm(config, layers, dtype)
        size = config.feedforward_width
        self.gate = (
            Linear(layers, width, size, scale=inner, axes=("width", "ffn"), **feedforward)
            if config.gated
            else None
        )
        self.up = Linear(layers, width, size, scale=inner, axes=("width", "ffn"), **feedforward)
        self.down = Linear(layers, size, width, scale=outer, axes=("ffn", "width"), **feedforward)

    def __call__(
        self,
        x: Float[Array, "M D"],
        context: _Context,
        past: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]] | None,
    ) -> tuple[Float[Array, "M D"], tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]]:
        attended, present = self._attend(self.attention_norm(x), context, past)
        x = x + attended
        h = self.feedforward_norm(x)
        activate = jax.nn.silu if self.config.activation == "silu" else _exact_gelu
        hidden = activate(self.up(h)) if self.gate is None else activate(self.gate(h)) * self.up(h)
        return x + self.down(hidden), present

    def _attend(self, h, context, past):
        config = self.config
        batch, length = context.mask.shape[:2]
        query = self.query(h).reshape(batch, length, config.head_count, config.head_size)
        key = self.key(h).reshape(batch, length, config.key_head_count, config.head_size)
        value = self.value(h).reshape(batch, length, config.key_head_count, config.head_size)
        if context.rope is not None:
            query, key = rotate(query, *context.rope), rotate(key, *context.rope)
        if past is not None:
            start = (0, context.slot, 0, 0)
            key = jax.lax.dynamic_update_slice(past[0], key.astype(past[0].dtype), start)
            value = jax.lax.dynamic_update_slice(past[1], value.astype(past[1].dtype), start)
        key, value = key.astype(query.dtype), value.astype(query.dtype)
        mixed = (attend_causal if past is None else attend)(query, key, value, context.mask)
        return self.output(mixed.reshape(batch * length, -1)), (key, value)


class Decoder(nnx.Module):
    """A causal language model. Parameters are stored in `dtype`, products computed in
    `compute_dtype`; norms, softmax and logits are always float32."""

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs,
        *,
        dtype: DTypeLike = jnp.float32,
        compute_dtype: DTypeLike = jnp.float32,
    ):
        shape = (config.vocabulary_size, config.width)
        embedding = 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.embedding = nnx.Param(embedding.astype(dtype), axes=("vocabulary", "width"))
        self.blocks = Block(config, rngs, dtype)
        self.norm = Norm(config, None, dtype)
        if config.tie_embeddings:
            self.head = None
        else:
            head = 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
            self.head = nnx.Param(head.astype(dtype), axes=("vocabulary", "width"))
        self.config = config
        self.compute_dtype = compute_dtype

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token after each position; a position whose `attention_mask` is 0 is
        seen by no other. `positions` count from 0 at the first column unless given."""
        valid = None if attention_mask is None else attention_mask.astype(bool)
        return self.logits(self.hidden(tokens, positions=positions, valid=valid))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        valid: Bool[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        remat: bool = False,
    ) -> Float[Array, "B T D"]:
        """Final normed states. Tokens attend to earlier `valid` tokens of their own segment."""
        batch, length = tokens.shape
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
        if valid is not None:
            mask = mask & valid[:, None, :]
        if segments is not None:
            mask = mask & (segments[:, :, None] == segments[:, None, :])
        positions = _positions(tokens) if positions is None else positions
        context = _Context(mask, self._rope(positions), None)
        graph, layers = nnx.split(self.blocks)

        def layer(h, parameters):
            return nnx.merge(graph, parameters)(h, context, None)[0], None

        h = self._embed(tokens, positions)
        h, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, h, layers)
        return self.norm(h).reshape(batch, length, -1)

    def extend(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        *,
        valid: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Final states of new tokens after those in the cache, and the longer cache. Sequences of
        unequal length are padded on the left, with `valid` false there; positions count from the
        first valid token of each sequence."""
        batch, length = tokens.shape
        slots = cache.valid.shape[1]
        seen = jax.lax.dynamic_update_slice(cache.valid, valid, (0, cache.length))
        before = cache.valid.sum(axis=1, dtype=jnp.int32)
        positions = before[:, None] + jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
        causal = jnp.arange(slots)[None, :] <= cache.length + jnp.arange(length)[:, None]
        context = _Context(causal[None] & seen[:, None, :], self._rope(positions), cache.length)
        graph, layers = nnx.split(self.blocks)

        def layer(h, inputs):
            parameters, past = inputs
            return nnx.merge(graph, parameters)(h, context, past)

        h = self._embed(tokens, positions)
        h, (keys, values) = jax.lax.scan(layer, h, (layers, (cache.keys, cache.values)))
        longer = Cache(keys, values, seen, cache.length + length)
        return self.norm(h).reshape(batch, length, -1), longer

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """float32 scores over the vocabulary."""
        head = self.output_head().astype(hidden.dtype)
        return jnp.einsum("...D,VD->...V", hidden, head, preferred_element_type=jnp.float32)

    def output_head(self) -> Float[Array, "V D"]:
        """The matrix that turns states into logits: the embedding where they are tied."""
        return (self.embedding if self.head is None else self.head)[...]

    def _embed(self, tokens, positions):
        config = self.config
        h = self.embedding[...][tokens].astype(self.compute_dtype)
        if config.embedding_scale != 1.0:
            h = h * jnp.asarray(config.embedding_scale, self.compute_dtype)
        if config.positions == "sinusoidal":
            sinusoids = sinusoidal(positions + config.position_offset, config.width)
            h = h + sinusoids.astype(h.dtype)
        return h.reshape(-1, config.width)

    def _rope(self, positions):
        if self.config.positions != "rope":
            return None
        return rope_angles(positions, self.config.head_size, self.config.rope_theta)


def attend_causal(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    mask: Bool[Array, "B T T"],
) -> Float[Array, "B T N H"]:
    """`attend` for a mask that lets nobody see later positions: queries go in up to eight blocks,
    each against the keys up to its own end, which saves up to 44% of the scores."""
    length = query.shape[1]
    block = max(64, -(-length // 8))
    parts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        part = query[:, start:end], key[:, :end], value[:, :end], mask[:, start:end, :end]
        parts.append(attend(*part))
    return jnp.concatenate(parts, axis=1)


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention with grouped keys; softmax in float32."""
    batch, length, heads, size = query.shape
    groups = heads // key.shape[2]
    query = query.reshape(batch, length, key.shape[2], groups, size) * size**-0.5
    # Heads before positions, explicitly: batched products of contiguous matrices are the ones
    # that XLA hands to its fast kernels on CPUs.
    query = query.transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", query, key, preferred_element_type=jnp.float32)
    # A finite stand-in for minus infinity: a row with nothing to see gives a mean, not a NaN.
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("BKGTS,BKSH->BKGTH", weights, value)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


def rope_angles(
    positions: Int[Array, "B T"], head_size: int, theta: float
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Cosines and sines of the rotary angles (Su et al. 2021), in float32: bf16 would confuse
    neighbouring positions beyond 256."""
    frequencies = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H2"], sin: Float[Array, "B T H2"]
) -> Float[Array, "B T N H"]:
    """Turns the halves of each head by the position's angle (the layout of Llama on the Hub)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def sinusoidal(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Fixed positions as in tensor2tensor and XGLM: sines, then cosines, of width / 2 frequencies
    that fall geometrically from 1 to 1/10000; an odd width ends in a zero."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10_000.0) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.concatenate(
        [jnp.sin(angles), jnp.cos(angles), jnp.zeros((*positions.shape, width % 2))], axis=-1
    )


def _exact_gelu(x):
    return jax.nn.gelu(x, approximate=False)


def _positions(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
