"""One layer of the transformer: attention and feed-forward, with norms and residuals."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from xelm.models.attention import attend
from xelm.models.cache import LayerCache, store
from xelm.models.config import ModelConfig
from xelm.models.context import Context
from xelm.models.layers import ACTIVATIONS, XIELU, Linear, Norm
from xelm.models.positions import rotate
from xelm.models.products import FEW

Result = tuple[Float[Array, "M D"], LayerCache | None, Any]
"""States; the cache of the layer, None if there is none; and what was observed."""


class Expert(nnx.Module):
    """One of several feed-forwards of a layer."""

    def __init__(
        self, config: ModelConfig, linear: Callable[..., Linear], scale: float, dtype: DTypeLike
    ):
        width, ffn, bias = config.width, config.feedforward_width, config.feedforward_bias
        self.gate = linear(width, ffn, ("width", "ffn"), bias) if config.gated else None
        self.up = linear(width, ffn, ("width", "ffn"), bias)
        self.down = linear(ffn, width, ("ffn", "width"), bias, scale)
        xielu = config.activation == "xielu"
        self.xielu = XIELU(config.layer_count, dtype) if xielu else None


class Block(nnx.Module):
    """A transformer layer: made with the stacked parameters of all, called with those of one."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: DTypeLike):
        layers, width = config.layer_count, config.width
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
        # Of inputs (of sums, where norms come after these), and of results.
        inputs = config.norm_placement != "result"
        results = config.norm_placement in ("around", "result")
        self.attention_norm = Norm(config, layers, dtype) if inputs else None
        self.query = linear(width, heads, ("width", "heads"), config.query_bias)
        self.key = linear(width, keys, ("width", "keys"), config.query_bias)
        self.value = linear(width, keys, ("width", "keys"), config.query_bias)
        normed, counts = config.head_norm, (config.head_count, config.key_head_count)
        self.query_norm = Norm(config, layers, dtype, heads=counts[0]) if normed else None
        self.key_norm = Norm(config, layers, dtype, heads=counts[1]) if normed else None
        self.output = linear(heads, width, ("heads", "width"), config.output_bias, outer)
        own = inputs and config.parallel != "one norm"
        self.feedforward_norm = Norm(config, layers, dtype) if own else None
        count = config.expert_count
        self.router = linear(width, count, ("width", "experts"), False) if count else None
        only = None if count else Expert(config, linear, outer, dtype)
        self.gate, self.up, self.down = (only.gate, only.up, only.down) if only else (None,) * 3
        self.xielu = only.xielu if only else None
        for number in range(count):
            setattr(self, f"expert_{number}", Expert(config, linear, outer, dtype))
        self.attention_result_norm = Norm(config, layers, dtype) if results else None
        self.feedforward_result_norm = Norm(config, layers, dtype) if results else None

    def __call__(
        self,
        x: Float[Array, "M D"],
        context: Context,
        number: Int[Array, ""],
        local: Bool[Array, ""] | bool,
        cache: LayerCache | None = None,
        observe: Callable[["Block", Float[Array, "M D"]], Any] = lambda block, h: None,
    ) -> Result:
        """States after layer `number`, which is `local` or global, its cache with the tokens of
        this pass, and what `observe` makes of the layer and the input of its feed-forward."""
        if self.config.norm_placement == "after":
            attended, cache = self._attention(x, context, number, local, cache)
            x = _normed(x + attended, self.attention_norm)
            found = observe(self, x)
            return _normed(x + self._feedforward(x), self.feedforward_norm), cache, found
        h = _normed(x, self.attention_norm)
        if not self.config.first_norm:
            h = jnp.where(number == 0, x, h)
        attended, cache = self._attention(h, context, number, local, cache)
        attended = self._scaled(_normed(attended, self.attention_result_norm))
        if self.config.parallel == "no":
            x = x + attended
            h = _normed(x, self.feedforward_norm)
        else:
            h = h if self.feedforward_norm is None else self.feedforward_norm(x)
            x = x + attended
        found, fed = observe(self, h), self._feedforward(h)
        return x + self._scaled(_normed(fed, self.feedforward_result_norm)), cache, found

    def _scaled(self, result):
        """A result of attention or feed-forward, as it is added to the states."""
        scale = self.config.residual_scale
        return result if scale == 1.0 else result * jnp.asarray(scale, result.dtype)

    @jax.named_scope("attention")
    def _attention(self, h, context, number, local, cache):
        config, view = self.config, context.view(local)
        batch, length = view.mask.shape[:2]
        query, key, value = self.query(h), self.key(h), self.value(h)
        joint, late = config.head_norm_form == "joint", config.head_norm_after_positions
        if joint:
            query, key = _normed(query, self.query_norm), _normed(key, self.key_norm)
        query = query.reshape(batch, length, config.head_count, config.head_size)
        key = key.reshape(batch, length, config.key_head_count, config.head_size)
        value = value.reshape(batch, length, config.key_head_count, config.head_size)
        if not joint and not late:
            query, key = _normed(query, self.query_norm), _normed(key, self.key_norm)
        if view.rope is not None:
            query, key = (self._rotated(x, number, *view.rope) for x in (query, key))
        if late:
            query, key = _normed(query, self.query_norm), _normed(key, self.key_norm)
        query = self._grown(query, context.positions)
        if context.fused is not None:
            mixed = context.fused(query, key, value, local)
            return self.output(mixed.reshape(batch * length, -1)), cache
        if cached := cache is not None:
            ring = context.ring if local is True else None
            slots = context.positions if ring is None else context.positions % ring
            cache = key, value = store(cache, key, value, slots, context.target)
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
            window=config.local_window if config.local_layers and not cached else None,
            # Of a layer with a cache it is in the mask.
            local=None
            if isinstance(local, bool) or len(config.local_layers) == config.layer_count
            else local,
        )
        return self.output(mixed.reshape(batch * length, -1)), cache

    def _rotated(self, x, number, cos, sin):
        """Queries or keys of layer `number`, turned by their position's angle."""
        if nope := self.config.nope_layers:
            without = (number[None] == jnp.asarray(nope)).any()
            cos, sin = jnp.where(without, 1, cos), jnp.where(without, 0, sin)
        return rotate(x, cos, sin, interleaved=self.config.rope.interleaved)

    def _grown(self, query, positions):
        """Queries, larger at later positions (`query_growth`)."""
        growth, length = self.config.rope.query_growth, self.config.rope.original_length
        if not growth or length is None:
            return query
        factor = 1 + growth * jnp.log1p((positions // length).astype(jnp.float32))
        return (query * factor[:, :, None, None]).astype(query.dtype)

    @jax.named_scope("feedforward")
    def _feedforward(self, h):
        if self.router is None:
            return self._fed(self, h)
        _, weights = self.route(h)

        def passed(number):
            expert, own = getattr(self, f"expert_{number}"), weights[:, number, None]
            own = own.astype(h.dtype)

            def compute(h):
                return own * self._fed(expert, h)

            # All tokens pass all experts, which keeps shapes static, and most of that is for
            # nothing. Few tokens take as long as the parameters take to be read: only those of
            # experts with weight are.
            if len(h) > FEW:
                return compute(h)
            return jax.lax.cond((own > 0).any(), compute, jnp.zeros_like, h)

        parts = (passed(number) for number in range(self.config.expert_count))
        return functools.reduce(jnp.add, parts)

    def _fed(self, layer, h):
        activate = layer.xielu or ACTIVATIONS[self.config.activation]
        if layer.gate is None:
            return layer.down(activate(layer.up(h)))
        # The gate first: the gradient by h is summed in the order of its uses, and another order
        # rounds differently, so that trainings would not repeat those of earlier versions.
        return layer.down(activate(layer.gate(h)) * layer.up(h))

    @jax.named_scope("router")
    def route(self, h: Float[Array, "M D"]) -> tuple[Float[Array, "M E"], Float[Array, "M E"]]:
        """The router's probabilities of the experts, and the weights with which their results are
        added: the probabilities of the `experts_per_token` most probable, scaled to sum 1 (Jiang et
        al. 2024, arXiv 2401.04088, section 2.1) unless the configuration says otherwise. float32.
        """
        assert self.router is not None
        probabilities = jax.nn.softmax(self.router(h).astype(jnp.float32), axis=-1)
        chosen = most_probable(probabilities, self.config.experts_per_token)
        kept = probabilities * chosen
        if not self.config.expert_weights_sum_to_one:
            return probabilities, kept
        return probabilities, kept / kept.sum(axis=-1, keepdims=True)


def _normed(x: Float[Array, "*B D"], norm: Norm | None) -> Float[Array, "*B D"]:
    """`x` after a norm, or as it is where there is none."""
    return x if norm is None else norm(x)


def most_probable(probabilities: Float[Array, "*B E"], count: int) -> Float[Array, "*B E"]:
    """1 for each of the `count` largest of each row, of equal ones the first, and 0 for others."""
    _, numbers = jax.lax.top_k(probabilities, count)
    return jax.nn.one_hot(numbers, probabilities.shape[-1]).sum(axis=-2)
