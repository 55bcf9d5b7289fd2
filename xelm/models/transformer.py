"""One transformer in flax.nnx, decoder or encoder: blocks stacked on a leading layer axis, scanned.

Knows arrays and nothing of files, experts or training. Dimension letters: see `xelm.models.config`.
Dense layers work on [B*T, D]: with a [B, T, D] operand XLA on CPUs computes the weight gradient on
a transposed copy and misses its fast kernels.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from xelm.models.attention import KEPT, Bias, attend
from xelm.models.config import ModelConfig
from xelm.models.head import Head
from xelm.models.positions import (
    alibi_slopes,
    columns,
    rope_angles,
    rotate,
    sinusoidal,
    valid_positions,
)
from xelm.models.products import by_rows_of

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


# What a layer keeps for the way back, by `remat`: products of dense layers and what attention gave,
# so that only what is cheap is computed twice; or the latter alone.
_KEPT = {
    False: jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(KEPT),
    ),
    True: jax.checkpoint_policies.save_only_these_names(KEPT),
}


class Cache(NamedTuple):
    """Keys and values of the tokens that R texts have so far, by layer; the slot of a token is its
    position. Layers lie apart, and heads before positions, so that nothing is copied to be read."""

    keys: tuple[Float[Array, "R K S H"], ...]
    values: tuple[Float[Array, "R K S H"], ...]
    length: Int[Array, " R"]
    """Tokens of each text; slots from there on hold nothing of worth."""


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> Cache:
    """A cache with room for `slots` tokens of each of `batch` texts."""
    shape = (batch, config.key_head_count, slots, config.head_size)
    keys, values = (
        tuple(jnp.zeros(shape, dtype) for _ in range(config.layer_count)) for _ in range(2)
    )
    return Cache(keys, values, jnp.zeros(batch, jnp.int32))


class Linear(nnx.Module):
    """x @ weight + bias, stacked over layers (None: a single one); `axes` name its dimensions for
    sharding. turned: the weight is [outputs, inputs], as inference has it."""

    turned: bool = False

    def __init__(
        self,
        layers: int | None,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        scale: float,
        axes: tuple[str, str],
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        stack, stacked = _stack(layers)
        weight = scale * jax.random.normal(rngs.params(), (*stack, inputs, outputs), jnp.float32)
        self.weight = nnx.Param(weight.astype(dtype), axes=(*stacked, *axes))
        zeros = jnp.zeros((*stack, outputs), dtype) if bias else None
        self.bias = None if zeros is None else nnx.Param(zeros, axes=(*stacked, axes[1]))

    def __call__(self, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
        weight = self.weight[...].astype(x.dtype)
        y = by_rows_of(x, weight) if self.turned else x @ weight
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)[None]


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last dimension, computed in float32, stacked over layers (None:
    a single one)."""

    def __init__(self, config: ModelConfig, layers: int | None, dtype: DTypeLike):
        stack, stacked = _stack(layers)
        shape, axes = (*stack, config.width), (*stacked, "width")
        self.scale = nnx.Param(jnp.full(shape, 1 - config.norm_offset, dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape, dtype), axes=axes) if config.norm_bias else None
        self.centred = config.norm == "layer"
        self.offset, self.epsilon = config.norm_offset, config.norm_epsilon

    def __call__(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        h = x.astype(jnp.float32)
        if self.centred:
            h = h - h.mean(axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(axis=-1, keepdims=True) + self.epsilon)
        h = h * (self.offset + self.scale[...].astype(jnp.float32))[None]
        if self.bias is not None:
            h = h + self.bias[...].astype(jnp.float32)[None]
        return h.astype(x.dtype)


class HeadNorm(nnx.Module):
    """RMSNorm of every head of queries or keys (Dehghani et al. 2023, arXiv 2302.05442)."""

    def __init__(self, config: ModelConfig, layers: int, dtype: DTypeLike):
        shape = (layers, config.head_size)
        scale = jnp.full(shape, 1 - config.norm_offset, dtype)
        self.scale = nnx.Param(scale, axes=("layers", "head"))
        self.offset, self.epsilon = config.norm_offset, config.norm_epsilon

    def __call__(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(axis=-1, keepdims=True) + self.epsilon)
        scale = self.offset + self.scale[...].astype(jnp.float32)
        return (h * scale[None, None, None]).astype(x.dtype)


@dataclass(frozen=True)
class _View:
    """Who is seen by whom, and from where: of global layers, or of local ones."""

    mask: Bool[Array, "B T S"]
    rope: tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]] | None


@dataclass(frozen=True)
class _Context:
    """What every layer needs besides its input: the same for all layers of one call."""

    positions: Int[Array, "B T"]
    everywhere: _View
    locally: _View | None
    bias: Bias | None
    rows: Int[Array, " B"] | None
    """Of a cache, in which the texts lie; None: they are all of it, in order."""

    def view(self, local: Bool[Array, ""]) -> _View:
        """Of one layer."""
        if self.locally is None:
            return self.everywhere
        pick = jax.tree.map(
            lambda a, b: jnp.where(local, a, b),
            (self.locally.mask, self.locally.rope),
            (self.everywhere.mask, self.everywhere.rope),
        )
        return _View(*pick)


Lookup = Callable[[Array, Array], Array]
"""(table [V, D], tokens [B, T]) -> [B, T, D]"""


def rows_of(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The rows of a table that one device holds."""
    return table[tokens]


Past = tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]
"""Keys and values."""


class Block(nnx.Module):
    """Attention and feed-forward with residuals. Holds all L layers; is called as one of them."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        layers, width, ffn = config.layer_count, config.width, config.feedforward_width
        heads = config.head_count * config.head_size
        keys = config.key_head_count * config.head_size
        # 0.02 is the initialiser of GPT-2, Llama and XGLM; residual outputs shrink with depth as
        # in GPT-2, so that the variance of the residual stream does not grow with L.
        inner, outer = 0.02, 0.02 / (2 * layers) ** 0.5

        def linear(inputs, outputs, axes, bias, scale=inner):
            return Linear(
                layers, inputs, outputs, bias=bias, scale=scale, axes=axes, rngs=rngs, dtype=dtype
            )

        self.config = config
        self.attention_norm = Norm(config, layers, dtype)
        self.query = linear(width, heads, ("width", "heads"), config.query_bias)
        self.key = linear(width, keys, ("width", "keys"), config.query_bias)
        self.value = linear(width, keys, ("width", "keys"), config.query_bias)
        self.query_norm = HeadNorm(config, layers, dtype) if config.head_norm else None
        self.key_norm = HeadNorm(config, layers, dtype) if config.head_norm else None
        self.output = linear(heads, width, ("heads", "width"), config.output_bias, outer)
        self.feedforward_norm = Norm(config, layers, dtype)
        bias = config.feedforward_bias
        self.gate = linear(width, ffn, ("width", "ffn"), bias) if config.gated else None
        self.up = linear(width, ffn, ("width", "ffn"), bias)
        self.down = linear(ffn, width, ("ffn", "width"), bias, outer)
        around = config.norm_placement == "around"
        self.attention_result_norm = Norm(config, layers, dtype) if around else None
        self.feedforward_result_norm = Norm(config, layers, dtype) if around else None

    def __call__(
        self,
        x: Float[Array, "M D"],
        context: _Context,
        past: Past | None,
        number: Int[Array, ""],
        local: Bool[Array, ""],
    ) -> tuple[Float[Array, "M D"], Past]:
        view = context.view(local)
        if self.config.norm_placement == "after":
            attended, present = self._attend(x, context, view, past)
            x = self.attention_norm(x + attended)
            return self.feedforward_norm(x + self._feed(x)), present
        h = self.attention_norm(x)
        if not self.config.first_norm:
            h = jnp.where(number == 0, x, h)
        attended, present = self._attend(h, context, view, past)
        if self.attention_result_norm is not None:
            attended = self.attention_result_norm(attended)
        x = x + attended
        fed = self._feed(self.feedforward_norm(x))
        if self.feedforward_result_norm is not None:
            fed = self.feedforward_result_norm(fed)
        return x + fed, present

    def _feed(self, h):
        activate = ACTIVATIONS[self.config.activation]
        hidden = activate(self.up(h)) if self.gate is None else activate(self.gate(h)) * self.up(h)
        return self.down(hidden)

    def _attend(self, h, context, view, past):
        config = self.config
        batch, length = view.mask.shape[:2]
        query = self.query(h).reshape(batch, length, config.head_count, config.head_size)
        key = self.key(h).reshape(batch, length, config.key_head_count, config.head_size)
        value = self.value(h).reshape(batch, length, config.key_head_count, config.head_size)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if view.rope is not None:
            query, key = rotate(query, *view.rope), rotate(key, *view.rope)
        if past is None:
            key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
        else:
            rows, slots = context.rows, context.positions
            places = (jnp.arange(batch) if rows is None else rows)[:, None]
            # Tokens beyond a text's end may have no slot.
            key = past[0].at[places, :, slots].set(key.astype(past[0].dtype), mode="drop")
            value = past[1].at[places, :, slots].set(value.astype(past[1].dtype), mode="drop")
            past = (key, value)
            if rows is not None:
                key, value = (kept.at[rows].get(mode="clip") for kept in past)
        scale = config.attention_scale
        mixed = attend(
            query,
            key.astype(query.dtype),
            value.astype(query.dtype),
            view.mask,
            scale=config.head_size**-0.5 if scale is None else scale,
            cap=config.attention_cap,
            bias=context.bias,
            causal=past is None and config.causal,
        )
        present = (key, value) if past is None else past
        return self.output(mixed.reshape(batch * length, -1)), present


class Transform(nnx.Module):
    """What states of an encoder pass on their way to the output head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        self.dense = Linear(
            None,
            config.width,
            config.width,
            bias=config.head_transform_bias,
            scale=0.02,
            # One of the two alone can be spread over a mesh axis.
            axes=("width", "transformed"),
            rngs=rngs,
            dtype=dtype,
        )
        self.norm = Norm(config, None, dtype)
        self.activate = ACTIVATIONS[config.activation]

    def __call__(self, h: Float[Array, "M D"]) -> Float[Array, "M D"]:
        return self.norm(self.activate(self.dense(h)))


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint that a model was loaded from."""

    config: str
    """Its config.json."""
    dtype: str
    """Of its weights."""
    # Where it lies makes no other model: one program computes all experts.
    directory: str = field(compare=False)
    """Its absolute path."""
    companions: tuple[str, ...] = field(compare=False)
    """Files beside its weights that go with them, relative to it."""


class Transformer(nnx.Module):
    """A language model, causal or masked. Parameters are stored in `dtype`, products computed in
    `compute_dtype`; norms, softmax and logits are always float32."""

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs,
        *,
        dtype: DTypeLike = jnp.float32,
        compute_dtype: DTypeLike = jnp.float32,
    ):
        def table(rows, axis):
            values = 0.02 * jax.random.normal(rngs.params(), (rows, config.width), jnp.float32)
            return nnx.Param(values.astype(dtype), axes=(axis, "columns"))

        vocabulary = config.vocabulary_size
        self.embedding = table(vocabulary, "vocabulary")
        self.blocks = Block(config, rngs, dtype)
        self.norm = Norm(config, None, dtype) if config.final_norm else None
        self.head = None if config.tie_embeddings else table(vocabulary, "vocabulary")
        self.positions = table(config.position_rows, "positions") if config.position_rows else None
        self.types = table(config.token_types, "types") if config.token_types else None
        self.embedding_norm = Norm(config, None, dtype) if config.embedding_norm else None
        self.transform = Transform(config, rngs, dtype) if config.head_transform else None
        self.head_bias = (
            nnx.Param(jnp.zeros(vocabulary, dtype), axes=("vocabulary",))
            if config.head_bias
            else None
        )
        self.config = config
        self.compute_dtype = compute_dtype
        self.origin: Origin | None = None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits at each position: of the next token, or of the one there (encoders). A position
        whose `attention_mask` is 0 is seen by no other. `positions` as in `hidden`."""
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
        lookup: Lookup = rows_of,
        layers: Sequence[Any] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final states. Tokens attend to `valid` tokens of their own segment; in decoders, to
        earlier ones. `positions` count from 0 at the first column unless given (in XLM-R, at the
        first `valid` one). lookup: of rows of tables that are spread over devices. layers: as in
        `extend`."""
        read = functools.partial(self._read, tokens, positions, valid, segments)
        h, _ = read(remat, lambda h: None, lookup, layers)
        return self._finish(h).reshape(*tokens.shape, -1)

    def means(
        self, tokens: Int[Array, "B T"], *, valid: Bool[Array, "B T"]
    ) -> Float[Array, "L B D"]:
        """Mean over the `valid` positions of the states after each layer, in float32; of the last
        layer, after the final norm."""
        shares = valid / jnp.maximum(valid.sum(axis=1, keepdims=True), 1)

        def mean(h):
            states = h.reshape(*tokens.shape, -1).astype(jnp.float32)
            return jnp.einsum("BTD,BT->BD", states, shares)

        h, found = self._read(tokens, None, valid, None, False, mean)
        return found.at[-1].set(mean(self._finish(h)))

    def _read(self, tokens, positions, valid, segments, remat, keep, lookup=rows_of, apart=None):
        """Flat states after the last layer, before the final norm, and what `keep` makes of those
        after each layer."""
        batch, length = tokens.shape
        mask = jnp.ones((batch, length, length), bool)
        if self.config.causal:
            mask = jnp.tril(mask)
        if valid is not None:
            mask = mask & valid[:, None, :]
        if segments is not None:
            mask = mask & (segments[:, :, None] == segments[:, None, :])
        if positions is None and valid is not None and self.config.positions_skip_padding:
            positions = valid_positions(valid)
        positions = columns(tokens) if positions is None else positions
        context = self._context(mask, positions, positions)
        graph, layers = nnx.split(self.blocks)

        def layer(h, inputs):
            parameters, number, local = inputs
            h = nnx.merge(graph, parameters)(h, context, None, number, local)[0]
            return h, keep(h)

        h = self._embed(tokens, positions, lookup)
        numbers = self._layers()
        if apart is not None:
            for inputs in zip(apart, *numbers):
                h = layer(h, inputs)[0]
            return h, jnp.zeros(0)
        # Inside a scan nothing is found common to both ways, so that need not be prevented.
        layer = jax.checkpoint(layer, prevent_cse=False, policy=_KEPT[remat])
        return jax.lax.scan(layer, h, (layers, *numbers))

    def extend(
        self,
        tokens: Int[Array, "B T"],
        counts: Int[Array, " B"],
        cache: Cache,
        layers: Sequence[Any],
        rows: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Final states of new tokens after those in the cache, and the longer cache. Of each row of
        `tokens` the first `counts` belong to the text; the states of others mean nothing. layers:
        parameters of each layer (`bind_layers`), in the place of this model's own: of stacked ones,
        a layer's would be copied for each token. rows: of the cache, in which the texts lie, each
        in its own (beyond the last: nothing of it is kept); None: they are all of it, in order."""
        begun = cache.length if rows is None else cache.length.at[rows].get(mode="clip")
        positions = begun[:, None] + jnp.arange(tokens.shape[1])[None]
        slots = jnp.arange(cache.keys[0].shape[2])
        mask = slots[None, None] <= positions[..., None]
        every_slot = jnp.broadcast_to(slots[None], mask[:, 0].shape)
        context = self._context(mask, positions, every_slot, rows)
        graph = nnx.split(self.blocks)[0]
        h, keys, values = self._embed(tokens, positions, rows_of), [], []
        pasts = zip(cache.keys, cache.values)
        for layer, number, local, past in zip(layers, *self._layers(), pasts):
            h, (key, value) = nnx.merge(graph, layer)(h, context, past, number, local)
            keys.append(key)
            values.append(value)
        if rows is None:
            length = cache.length + counts
        else:
            length = cache.length.at[rows].add(counts, mode="drop")
        longer = Cache(tuple(keys), tuple(values), length)
        return self._finish(h).reshape(*tokens.shape, -1), longer

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """float32 scores over the vocabulary, of final states."""
        states, head = self.output(hidden)
        return head.logits(states, by_rows_of)

    def output(self, hidden: Float[Array, "*B D"]) -> tuple[Float[Array, "*B D"], Head]:
        """Final states as the output head reads them, and that head; its matrix is the embedding
        where they are tied."""
        matrix = (self.embedding if self.head is None else self.head)[...]
        bias = None if self.head_bias is None else self.head_bias[...]
        if self.transform is not None:
            flat = self.transform(hidden.reshape(-1, self.config.width))
            hidden = flat.reshape(hidden.shape)
        return hidden, Head(matrix, bias, self.config.logit_cap)

    def _embed(self, tokens, positions, lookup):
        config = self.config
        h = lookup(self.embedding[...], tokens).astype(self.compute_dtype)
        if config.embedding_scale != 1.0:
            h = h * jnp.asarray(config.embedding_scale, self.compute_dtype)
        if self.types is not None:
            h = h + self.types[...][0].astype(h.dtype)[None, None]
        if self.positions is not None:
            places = positions + config.position_offset
            h = h + lookup(self.positions[...], places).astype(h.dtype)
        if config.positions == "sinusoidal":
            sinusoids = sinusoidal(positions + config.position_offset, config.width)
            h = h + sinusoids.astype(h.dtype)
        h = h.reshape(-1, config.width)
        return h if self.embedding_norm is None else self.embedding_norm(h)

    def _finish(self, h):
        return h if self.norm is None else self.norm(h)

    def _context(self, mask, positions, key_positions, rows=None):
        config = self.config
        rope, bias, locally = None, None, None
        if config.positions == "rope":
            rope = rope_angles(positions, config.rope, config.head_size)
        if config.positions == "alibi":
            bias = Bias(jnp.asarray(alibi_slopes(config.head_count)), key_positions)
        if config.local_window is not None:
            local_rope = rope
            if config.local_rope is not None:
                local_rope = rope_angles(positions, config.local_rope, config.head_size)
            apart = jnp.abs(positions[:, :, None] - key_positions[:, None, :])
            locally = _View(mask & (apart < config.local_window), local_rope)
        return _Context(positions, _View(mask, rope), locally, bias, rows)

    def _layers(self):
        """Number of each layer, and whether it is local."""
        numbers = np.arange(self.config.layer_count)
        return jnp.asarray(numbers), jnp.asarray(np.isin(numbers, self.config.local_layers))


def _stack(layers: int | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    return ((), ()) if layers is None else ((layers,), ("layers",))
