"""Parameters apart from their model: a nested dictionary of arrays, stacked over layers, with dense
weights as [inputs, outputs]; and the layout of inference."""

import functools
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from xelm.models.config import ModelConfig
from xelm.models.fused_attention import Spread, on_one_device
from xelm.models.layers import Linear
from xelm.models.narrow import Int8Matrix, is_matrix, stored_bytes
from xelm.models.target import CPU, Target, target_of
from xelm.models.transformer import Lookup, Transformer, rows_of

NEW_ROWS = "new_rows"
"""Name, among parameters, of embeddings [N, D] by which a model reads the last N ids of a
vocabulary that it does not know; their probability is zero. Of its own tables, rows beyond the
first V - N are not used then. With N = 0 a model is cut to a smaller vocabulary."""

EMBEDDING_FACTORS = "embedding_factors"
"""Name, among parameters `for_inference`, of two thin matrices, "b" [V, rank] and "a" [rank, D],
whose product is added to the embedding (and so to a tied output head) without being made."""


def graph(
    config: ModelConfig,
    compute_dtype: str = "float32",
    *,
    lookup: Lookup = rows_of,
    spread: Spread = on_one_device,
    rematerialise: bool = False,
    adapted: Collection[str] = (),
    scale: float = 1.0,
    stacks: int = 1,
    target: Target = CPU,
) -> nnx.GraphDef:
    """The model without parameters; allocates nothing. lookup: looks up rows of tables, maybe
    spread over devices; spread: does the same for kernels of attention. rematerialise: the
    backward pass computes all of a layer but attention
    again, to save memory. adapted: paths of the dense layers with an adapter, "blocks/query" and so
    on, whose factors are parameters then (`xelm.models.adapters`), with this scale. stacks:
    number of stacks of consecutive layers; for several, "blocks" of the parameters is a tuple.
    target: the kind of device that it is compiled for."""
    model = _abstract(config, compute_dtype)
    _adapt(model, adapted, scale)
    if stacks > 1:
        model.blocks = nnx.List([nnx.clone(model.blocks) for _ in range(stacks)])
        model.stacked = True
    model.lookup, model.spread = lookup, spread
    model.rematerialise, model.target = rematerialise, target
    return nnx.split(model)[0]


def inference_graph(
    config: ModelConfig,
    compute_dtype: str = "float32",
    *,
    adapted: Collection[str] = (),
    scale: float = 1.0,
    target: Target = CPU,
) -> nnx.GraphDef:
    """The model without parameters, for parameters in the layout of `for_inference`. adapted,
    scale, target: as in `graph`."""
    model = _abstract(config, compute_dtype)
    model.target = target
    _adapt(model, adapted, scale)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            module.outputs_first = True
    model.blocks = nnx.List([nnx.clone(model.blocks) for _ in range(config.layer_count)])
    return nnx.split(model)[0]


def bind(network: nnx.GraphDef, parameters: Mapping[str, Any]) -> Transformer:
    """The model of a graph with these parameters, in the layout that the graph is for."""
    new_rows, factors = parameters.get(NEW_ROWS), parameters.get(EMBEDDING_FACTORS)
    apart = (NEW_ROWS, EMBEDDING_FACTORS)
    parameters = {name: values for name, values in parameters.items() if name not in apart}
    blocks = parameters["blocks"]
    if isinstance(blocks, tuple):
        parameters = {**parameters, "blocks": dict(enumerate(blocks))}
    state = jax.tree.map(nnx.Param, parameters, is_leaf=lambda leaf: isinstance(leaf, Int8Matrix))
    model = nnx.merge(network, nnx.State(cast(Any, state)))
    model.new_rows = new_rows
    model.embedding_factors = None if factors is None else (factors["a"], factors["b"])
    return model


def compiled_by_model(
    network: Callable[..., nnx.GraphDef] = inference_graph, **options: Any
) -> Callable[[Callable[..., Any]], Callable[[ModelConfig, str], Callable[..., Any]]]:
    """Decorator of a function of a model, bound to parameters, and more. It becomes a function of
    (shape, compute dtype) that returns the compiled function of (parameters, and more). network:
    the graph that the parameters are for; factors of adapters may be among those `for_inference`.
    options: those of `jax.jit`."""

    def decorate(function):
        @functools.lru_cache(maxsize=8)
        def compiled(config, compute_dtype):
            network_here = functools.partial(
                network, config, compute_dtype, target=target_of(jax.devices())
            )
            model = network_here()

            @functools.wraps(function)
            def bound(parameters, *arguments, **more):
                adapted = _adapted_layers(parameters)
                # Compiled once for each structure of the parameters.
                own = network_here(adapted=adapted) if adapted else model
                return function(bind(own, parameters), *arguments, **more)

            return jax.jit(bound, **options)

        return compiled

    return decorate


def parameters_of(model: Transformer) -> dict[str, Any]:
    """The model's parameters as a nested dictionary of arrays."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def for_inference(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters in the layout of inference. "blocks" is a tuple with the parameters of each layer,
    since those of a stacked layer would be copied each time it is computed. Weights are [outputs,
    inputs], as in most checkpoints, which is read faster for a few tokens (`by_rows_of`)."""
    flat = by_path(parameters)
    turned = unflatten_dict({p: a.mT if is_weight(p) else a for p, a in flat.items()}, sep="/")
    blocks, take = turned["blocks"], operator.itemgetter
    count = len(jax.tree.leaves(blocks)[0])
    return {**turned, "blocks": tuple(jax.tree.map(take(n), blocks) for n in range(count))}


def stacked(path: str) -> bool:
    """Whether the parameter at a path is stacked over layers."""
    return path.startswith("blocks/")


def is_weight(path: str) -> bool:
    """Whether the parameter at a path is a dense layer's matrix, or a factor of its adapter."""
    return path.endswith(("/weight", "/lora_a", "/lora_b"))


def shapes(config: ModelConfig) -> dict[str, Any]:
    """Shapes of the parameters as a nested dictionary; allocates nothing."""
    return parameters_of(_abstract(config, "float32"))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """Names of the dimensions of each parameter, as a nested dictionary."""
    state = nnx.state(_abstract(config, "float32"), nnx.Param)
    named = jax.tree.map(
        lambda p: p.get_metadata()["axes"], state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return nnx.to_pure_dict(named)


def fresh_parameters(
    config: ModelConfig, random_seed: int, shardings: Any = None
) -> dict[str, Any]:
    """Random parameters of a new model, float32. shardings: None puts all on the first device."""
    make = jax.jit(
        lambda key: parameters_of(Transformer(config, nnx.Rngs(key))), out_shardings=shardings
    )
    return make(jax.random.key(random_seed))


def matrices(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Whether each parameter is a matrix (stacked over layers or not), and no scale, bias or factor
    of an activation."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path[-1].key), parameters)


def by_path(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of a tree of parameters by their path, with slashes."""
    return cast(dict[str, Any], flatten_dict(tree, sep="/"))


@functools.lru_cache(maxsize=64)
def inference_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of a model's parameters where they are stored in this dtype for inference."""
    return stored_bytes({path: leaf.shape for path, leaf in by_path(shapes(config)).items()}, dtype)


def _adapted_layers(parameters: Mapping[str, Any]) -> list[str]:
    """Paths of the dense layers that have factors among parameters `for_inference`."""
    blocks = parameters["blocks"]
    names = blocks[0] if isinstance(blocks, tuple) else {}
    return [f"blocks/{name}" for name, values in names.items() if "lora_a" in values]


def _adapt(model: Transformer, adapted: Collection[str], scale: float) -> None:
    for path in adapted:
        layer = functools.reduce(getattr, path.split("/"), model)
        assert isinstance(layer, Linear)
        layer.adapt(scale)


def _abstract(config: ModelConfig, compute_dtype: str) -> Transformer:
    """A model of shapes instead of arrays, which the caller may change."""
    return nnx.merge(*_abstract_parts(config, compute_dtype))


@functools.lru_cache(maxsize=64)
def _abstract_parts(config: ModelConfig, compute_dtype: str) -> tuple[nnx.GraphDef, Any]:
    # Kept, since tracing the initialisation takes longer than reading a small checkpoint.
    def model():
        return Transformer(config, nnx.Rngs(0), compute_dtype=jnp.dtype(compute_dtype))

    return nnx.split(nnx.eval_shape(model))
