"""Profiles can be read: operations of a model carry the names of the parts that they belong to."""

import re

import jax
import jax.numpy as jnp
from small_training import MODEL

from xelm.models.cache import empty_cache
from xelm.models.parameters import bind, for_inference, graph, inference_graph, shapes
from xelm.training.loss import cross_entropy

TOKENS = jax.ShapeDtypeStruct((2, 16), jnp.int32)
PARTS = ("embedding", "layer", "attention", "feedforward", "norm", "head", "loss")


def parts_of(function, *arguments) -> set[str]:
    """Our scopes of the operations in a program. Those of loops and branches are given without the
    scopes around the loop or branch, which are in the compiled program only."""
    text = jax.jit(function).lower(*arguments).as_text(debug_info=True)
    strings = re.findall(r'"([^"]*)"', text)
    names = (re.sub(r"jit\(\w+\)|transpose|jvp|[()]", "", string) for string in strings)
    return {"/".join(p for p in name.split("/")[:-1] if p.startswith(PARTS)) for name in names}


def test_operations_of_a_step_are_named_by_part():
    def step(parameters, tokens):
        model = bind(graph(MODEL), parameters)
        states, head = model.output(model.hidden(tokens))
        return cross_entropy(states, head, tokens, jnp.ones(tokens.shape))

    layer = {"layer", "layer/attention", "layer/feedforward", "layer/norm"}
    found = parts_of(jax.grad(step), shapes(MODEL), TOKENS)
    assert found == {"", "embedding", *layer, "norm", "head", "loss"}


def test_operations_of_inference_are_named_by_layer():
    def extend(parameters, tokens, counts, cache):
        model = bind(inference_graph(MODEL), parameters)
        states, cache = model.extend(tokens, counts, cache)
        return model.logits(states), cache

    parameters = jax.eval_shape(for_inference, shapes(MODEL))
    cache = jax.eval_shape(lambda: empty_cache(MODEL, 2, 32, jnp.float32))
    counts = jax.ShapeDtypeStruct((2,), jnp.int32)
    layers = {
        f"layer_{number}{part}"
        for number in range(MODEL.layer_count)
        for part in ("", "/attention", "/feedforward", "/norm")
    }
    found = parts_of(extend, parameters, TOKENS, counts, cache)
    assert found == {"", "embedding", *layers, "norm", "head"}
