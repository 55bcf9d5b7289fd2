"""One layer of the transformer: attention and feed-forward, with norms and residuals."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from xelm.models.attention import attend
from xelm.models.cache import LayerCache, store
from xelm.models.config import ModelConfig
from xelm.models.context import Context
from xelm.models.layers import ACTIVATIONS, Linear, Norm
from xelm.models.positions import rotate

Result = tuple[Float[Array, "M D"], LayerCache | None]
"""States, and the cache of the layer, None if there is none."""


class Block(nnx.Module):
    """A transformer layer: made with the stacked parameters of all, called with those of one."""

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
        normed = config.head_norm
        self.query_norm = Norm(config, layers, dtype, of_heads=True) if normed else None
        self.key_norm = Norm(config, layers, dtype, of_heads=True) if normed else None
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
        context: Context,
        number: Int[Array, ""],
        local: Bool[Array, ""],
        cache: LayerCache | None = None,
    ) -> Result:
        """States after layer `number`, which is `local` or global, and its cache with the tokens of
        this pass."""
        if self.config.norm_placement == "after":
            attended, cache = self._attention(x, context, local, cache)
            x = self.attention_norm(x + attended)
            return self.feedforward_norm(x + self._feedforward(x)), cache
        h = self.attention_norm(x)
        if not self.config.first_norm:
            h = jnp.where(number == 0, x, h)
        attended, cache = self._attention(h, context, local, cache)
        if self.attention_result_norm is not None:
            attended = self.attention_result_norm(attended)
        x = x + attended
        fed = self._feedforward(self.feedforward_norm(x))
        if self.feedforward_result_norm is not None:
            fed = self.feedforward_result_norm(fed)
        return x + fed, cache

    @jax.named_scope("attention")
    def _attention(self, h, context, local, cache):
        config, view = self.config, context.view(local)
        batch, length = view.mask.shape[:2]
        query = self.query(h).reshape(batch, length, config.head_count, config.head_size)
        key = self.key(h).reshape(batch, length, config.key_head_count, config.head_size)
        value = self.value(h).reshape(batch, length, config.key_head_count, config.head_size)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if view.rope is not None:
            query, key = rotate(query, *view.rope), rotate(key, *view.rope)
        if cached := cache is not None:
            cache, (key, value) = store(cache, key, value, context.rows, context.positions)
        else:
            key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
        scale = config.attention_scale
        mixed = attend(
            query,
            key.astype(query.dtype),
            value.astype(query.dtype),
            view.mask,
            scale=config.head_size**-0.5 if scale is None else scale,
            cap=config.attention_cap,
            bias=context.bias,
            causal=config.causal and not cached,
        )
        return self.output(mixed.reshape(batch * length, -1)), cache

    @jax.named_scope("feedforward")
    def _feedforward(self, h):
        activate = ACTIVATIONS[self.config.activation]
        hidden = activate(self.up(h)) if self.gate is None else activate(self.gate(h)) * self.up(h)
        return self.down(hidden)
