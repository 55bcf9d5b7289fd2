"""One transformer in flax.nnx, decoder or encoder: embeddings, layers and final norm. Its parts, in
modules of their own, know arrays and nothing of files, experts or training. Dimension letters: see
`xelm.models.config`."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from xelm.models import context as contexts
from xelm.models.attention import KEPT
from xelm.models.block import Block
from xelm.models.cache import Cache
from xelm.models.config import ModelConfig
from xelm.models.fused_attention import Spread, fused_attention, on_one_device
from xelm.models.head import Head, HeadTransform
from xelm.models.layers import Norm
from xelm.models.positions import sinusoidal
from xelm.models.products import by_rows_of
from xelm.models.target import CPU

# What a layer keeps for the backward pass, by `rematerialise`: products of dense layers and results
# of attention, so that only what is cheap is computed twice; or the latter alone.
_NAMED = jax.checkpoint_policies.save_only_these_names(KEPT)


def _of_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether this is cuDNN's attention, which gives its results no name."""
    return primitive.name.startswith("dot_product_attention_fwd")


_ATTENDED = jax.checkpoint_policies.save_from_both_policies(_NAMED, _of_cudnn)
_PRODUCTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_POLICIES = {
    False: jax.checkpoint_policies.save_from_both_policies(_PRODUCTS, _ATTENDED),
    True: _ATTENDED,
}

Lookup = Callable[[Any, Array], Array]
"""(table [V, D], tokens [B, T]) -> [B, T, D]"""


def rows_of(table: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of a table [V, D] that lies on one device; of an `Int8Matrix`, dequantised."""
    return table[tokens]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint that a model was loaded from."""

    config: str
    """Contents of its config.json."""
    dtype: str
    """Dtype of its weights."""
    # Where it lies makes no other model: one program computes all experts.
    directory: str = field(compare=False)
    """Its absolute path."""
    companions: tuple[str, ...] = field(compare=False)
    """Files that travel with its weights, as paths relative to it."""


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
        # Stacked layers, or several such stacks, or in the layout of inference a list of layers.
        self.blocks: Block | nnx.List = Block(config, rngs, dtype)
        self.norm = Norm(config, None, dtype) if config.final_norm else None
        self.head = None if config.tie_embeddings else table(vocabulary, "vocabulary")
        self.positions = table(config.position_rows, "positions") if config.position_rows else None
        self.types = table(config.token_types, "types") if config.token_types else None
        self.embedding_norm = Norm(config, None, dtype) if config.embedding_norm else None
        self.transform = HeadTransform(config, rngs, dtype) if config.head_transform else None
        zeros = jnp.zeros(vocabulary, dtype) if config.head_bias else None
        self.head_bias = None if zeros is None else nnx.Param(zeros, axes=("vocabulary",))
        self.config = config
        self.compute_dtype = compute_dtype
        self.lookup: Lookup = rows_of
        self.rematerialise = False
        self.target = CPU
        self.spread: Spread = on_one_device
        self.new_rows: Any = nnx.data(None)
        """Rows of ids that it does not know, as `parameters.NEW_ROWS`; None: it knows all."""
        self.embedding_factors: Any = nnx.data(None)
        """Product that is added to the embedding, as `parameters.EMBEDDING_FACTORS`, or None."""
        self.stacked = False
        self.origin: Origin | None = None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits at each position, float32: of the next token (decoders), or of the token there
        (encoders). No position sees one whose `attention_mask` is 0. `positions` as in `hidden`."""
        valid = None if attention_mask is None else attention_mask.astype(bool)
        return self.logits(self.hidden(tokens, positions, valid=valid))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        valid: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final states. Tokens attend to `valid` tokens of their own segment; in decoders, only to
        earlier ones. `positions` count from 0 at the first column unless given (in XLM-R, at the
        first `valid` one)."""
        context = self._context(tokens, positions, segments, valid)
        return self._forward(tokens, context)[0]

    def routed(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B T E"]]:
        """Final states as `hidden`, and the probabilities that the router of each layer gives to
        its experts; for models with experts."""
        context = self._context(tokens, positions, segments, None)
        states, found = self._forward(tokens, context, observe=lambda block, h: block.route(h)[0])
        return states, found.reshape(len(found), *tokens.shape, -1)

    def feedforward_moments(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> tuple[Float[Array, "L D"], Float[Array, "L D D"]]:
        """Sums of the input of each layer's feed-forward, and of its products with itself, over all
        positions but padding (segment 0), in float32."""

        def moments(block, h):
            h = jnp.where(segments.reshape(-1, 1) > 0, h.astype(jnp.float32), 0)
            return h.sum(axis=0), h.T @ h

        context = self._context(tokens, positions, segments, None)
        return self._forward(tokens, context, observe=moments)[1]

    def means(
        self, tokens: Int[Array, "B T"], *, valid: Bool[Array, "B T"]
    ) -> Float[Array, "L B D"]:
        """Mean over the `valid` positions of the states after each layer, in float32; of the last
        layer, after the final norm."""
        shares = valid / jnp.maximum(valid.sum(axis=1, keepdims=True), 1)

        def mean(h):
            states = h.reshape(*tokens.shape, -1).astype(jnp.float32)
            return jnp.einsum("BTD,BT->BD", states, shares)

        context = self._context(tokens, None, None, valid)
        final, found = self._forward(tokens, context, measure=mean)
        return found.at[-1].set(mean(final))

    def extend(
        self,
        tokens: Int[Array, "B T"],
        counts: Int[Array, " B"],
        cache: Cache,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Final states of new tokens after those in the cache, and the longer cache; for models in
        the layout of inference, whose layers are not stacked (a copy would be made of each layer's
        parameters for every token).

        tokens: those of each row of the cache, in order. counts: number of tokens of each row of
        `tokens` that belong to its sequence, from the left; states of the others mean nothing."""
        context = contexts.of_cached(self.config, tokens, cache, self.target)
        states, layers = self._forward(tokens, context, cache)
        keys, values = zip(*layers)
        return states, Cache(keys, values, cache.length + counts)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores over the vocabulary for final states, float32."""
        states, head = self.output(hidden)
        return head.logits(states, by_rows_of)

    def output(self, hidden: Float[Array, "*B D"]) -> tuple[Float[Array, "*B D"], Head]:
        """Final states as the output head takes them, and that head."""
        if self.transform is not None:
            with jax.named_scope("head"):
                flat = self.transform(hidden.reshape(-1, self.config.width))
                hidden = flat.reshape(hidden.shape)
        return hidden, self.output_head()

    def output_head(self) -> Head:
        """The output head. Its matrix is the embedding where the two are tied."""
        matrix = (self.embedding if self.head is None else self.head)[...]
        bias = None if self.head_bias is None else self.head_bias[...]
        factors = self.embedding_factors if self.head is None else None
        size = self.config.vocabulary_size
        known = None if self.new_rows is None else size - len(self.new_rows)
        scale, cap = self.config.logit_scale, self.config.logit_cap
        return Head(matrix, bias, cap, known, size, factors, scale, self.target)

    def _context(self, tokens, positions, segments, valid):
        """The context of sequences that are read as a whole; arguments as in `hidden`."""
        context = contexts.of_sequences(self.config, tokens, positions, segments, valid)
        if valid is not None:
            return context
        segments = jnp.zeros(tokens.shape, jnp.int32) if segments is None else segments
        about = self.config, self.target, self.compute_dtype
        return replace(context, fused=fused_attention(*about, segments, self.spread))

    def _forward(
        self, tokens, context, cache=None, measure=lambda h: None, observe=lambda block, h: None
    ) -> tuple[Any, Any]:
        """Final states [B, T, D], and one value for each layer: in the layout of inference its
        longer cache (None without `cache`), otherwise what `measure` makes of its states or
        `observe` of the layer and the input of its feed-forward."""
        h = self._embed(tokens, context.positions)
        numbers = np.arange(self.config.layer_count)
        local = jnp.asarray(np.isin(numbers, self.config.local_layers))
        numbers = jnp.asarray(numbers)
        if isinstance(self.blocks, Block) or self.stacked:
            assert cache is None
            h, found = self._scanned(h, context, numbers, local, measure, observe)
        else:
            found = []
            caches = [None] * len(numbers) if cache is None else zip(cache.keys, cache.values)
            for place, inputs in enumerate(zip(self.blocks, numbers, local, caches)):
                block, number, is_local, past = inputs
                if cache is not None:  # whose shape depends on it
                    is_local = place in self.config.local_layers
                with jax.named_scope(f"layer_{place}"):
                    h, longer, _ = block(h, context, number, is_local, past)
                found.append(longer)
        h = h if self.norm is None else self.norm(h)
        return h.reshape(*tokens.shape, -1), found

    def _scanned(self, h, context, numbers, local, measure, observe) -> tuple[Any, Any]:
        """The same by stacked layers, of which a single one is compiled for each stack."""
        blocks = [self.blocks] if isinstance(self.blocks, Block) else list(self.blocks)
        first, found = 0, []
        for block in blocks:
            graph, parameters = nnx.split(block)

            @jax.named_scope("layer")
            def layer(h, inputs, graph=graph):
                parameters, number, local = inputs
                block = nnx.merge(graph, parameters)
                h, _, found = block(h, context, number, local, observe=observe)
                return h, measure(h) if found is None else found

            # Inside a scan nothing is found common to both ways, so that need not be prevented.
            policy = _POLICIES[self.rematerialise]
            layer = jax.checkpoint(layer, prevent_cse=False, policy=policy)
            last = first + len(jax.tree.leaves(parameters)[0])
            inputs = parameters, numbers[first:last], local[first:last]
            h, some = jax.lax.scan(layer, h, inputs)
            first, found = last, [*found, some]
        return h, jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)

    def _rows_of(self, tokens):
        """Rows of the embedding, and of ids that the model does not know."""
        new, ids = self.new_rows, tokens
        if new is not None and len(new):
            known = self.config.vocabulary_size - len(new)
            ids = jnp.where(tokens < known, tokens, 0)
        h = self.lookup(self.embedding[...], ids)
        if self.embedding_factors is not None:
            a, b = self.embedding_factors
            h = h + self.lookup(b, ids) @ a
        if new is None or not len(new):
            return h
        others = self.lookup(new, jnp.maximum(tokens - known, 0))
        return jnp.where((tokens < known)[:, :, None], h, others.astype(h.dtype))

    @jax.named_scope("embedding")
    def _embed(self, tokens, positions):
        config = self.config
        h = self._rows_of(tokens).astype(self.compute_dtype)
        if config.embedding_scale != 1.0:
            h = h * jnp.asarray(config.embedding_scale, self.compute_dtype)
        if self.types is not None:
            h = h + self.types[...][0].astype(h.dtype)[None, None]
        if self.positions is not None:
            places = positions + config.position_offset
            h = h + self.lookup(self.positions[...], places).astype(h.dtype)
        if config.positions == "sinusoidal":
            sinusoids = sinusoidal(positions + config.position_offset, config.width)
            h = h + sinusoids.astype(h.dtype)
        h = h.reshape(-1, config.width)
        return h if self.embedding_norm is None else self.embedding_norm(h)
