"""What a training trains of a model, and what it only reads: adapters beside frozen weights, or all
layers but some; and the weights that it is pulled back to."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from clustering.errors import UserError
from xelm.models.adapters import A, B, as_parameters, check_rank, chosen_targets
from xelm.models.config import ModelConfig
from xelm.models.parameters import by_path, matrices, shapes, stacked
from xelm.training_config import TrainConfig


class Fixed(NamedTuple):
    """What a step reads and never changes. It is not in checkpoints, but made again from the
    weights that the training starts from."""

    frozen: Mapping[str, Any]
    """Parameters that are not trained, matrices in the dtype of products."""
    start: Mapping[str, Any]
    """float32 parameters that the trained ones are pulled to; empty without a pull."""


NOTHING_FIXED = Fixed({}, {})
ROUTER = "blocks/router/weight"
"""Path of the routers of a mixture of experts."""


def frozen_layers(config: TrainConfig, layer_count: int) -> tuple[int, ...]:
    """Numbers of the layers that a training does not change. UserError for layers that the model
    does not have, and if none is left."""
    if config.frozen_layers is None:
        return ()
    if config.frozen_layers == "middle":
        third = layer_count // 3
        found = set(range(third, layer_count - third)) if third else set()
    else:
        found = set()
        for part in config.frozen_layers.split(","):
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    if not found or len(found) == layer_count or max(found) >= layer_count:
        raise UserError(
            f"frozen_layers must be some of the layers 0 to {layer_count - 1} of this model, and "
            f"not all; got {config.frozen_layers}"
        )
    return tuple(sorted(found))


def check_trainable(config: TrainConfig, model: ModelConfig) -> None:
    """Raises UserError for adapters and frozen layers that this model cannot have, and for the
    training of routers that it lacks."""
    if config.mixture.trained == "router" and not model.expert_count:
        raise UserError(
            "mixture.trained=router is for mixtures of experts; this model has no router"
        )
    frozen_layers(config, model.layer_count)
    if config.lora.rank is not None:
        check_rank(config.lora.rank, chosen_targets(config.lora.targets, model), model)


def divide(
    parameters: Mapping[str, Any], config: TrainConfig, model: ModelConfig, random_seed: Any = 0
) -> tuple[dict[str, Any], Fixed]:
    """The float32 parameters that are trained, of a model with these parameters, and what is fixed.

    With adapters, their factors are trained alone. The first is random, uniform within 1 over the
    square root of its inputs, and the second zero, so that the training starts from the very
    parameters. With frozen layers, "blocks" becomes several stacks of consecutive layers, by their
    place, which are trained or frozen as a whole. Of a mixture of experts, the routers may be
    trained alone."""
    dtype = config.runtime.dtype
    if config.lora.rank is not None:
        trained = _new_factors(parameters, config, model, random_seed)
        frozen = cast(parameters, dtype)
    elif frozen_layers(config, model.layer_count):
        trained, frozen = {}, {}
        rest = {path: leaf for path, leaf in by_path(parameters).items() if not stacked(path)}
        trained |= rest
        for place, (first, last, is_frozen) in enumerate(stacks(config, model)):
            part = {
                f"blocks/{place}/{path.removeprefix('blocks/')}": leaf[first:last]
                for path, leaf in by_path(parameters).items()
                if stacked(path)
            }
            (frozen if is_frozen else trained).update(part)
        trained, frozen = (unflatten_dict(part, sep="/") for part in (trained, frozen))
        frozen = cast(frozen, dtype)
    elif config.mixture.trained == "router":
        flat = by_path(parameters)
        parts = (
            {path: leaf for path, leaf in flat.items() if (path == ROUTER) == wanted}
            for wanted in (True, False)
        )
        trained, frozen = (unflatten_dict(part, sep="/") for part in parts)
        frozen = cast(frozen, dtype)
    else:
        trained, frozen = dict(parameters), {}
    return trained, Fixed(frozen, trained if config.optimizer.pull is not None else {})


def stacks(config: TrainConfig, model: ModelConfig) -> list[tuple[int, int, bool]]:
    """First layer, the layer after the last, and whether it is frozen, of each stack of consecutive
    layers; a single one where no layer is frozen."""
    frozen, found = frozen_layers(config, model.layer_count), []
    for is_frozen, some in groupby(range(model.layer_count), lambda layer: layer in frozen):
        numbers = list(some)
        found.append((numbers[0], numbers[-1] + 1, is_frozen))
    return found


def trained_count(config: TrainConfig, model: ModelConfig) -> int:
    """Number of values that a training trains."""
    found = jax.eval_shape(lambda parameters: divide(parameters, config, model)[0], shapes(model))
    return sum(leaf.size for leaf in jax.tree.leaves(found))


def together(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the whole model, as `bind` takes them: stacks of layers are a tuple."""
    if not frozen:
        return dict(trained)
    whole = unflatten_dict({**by_path(frozen), **by_path(trained)}, sep="/")
    if "0" in whole["blocks"]:
        parts = whole["blocks"]
        whole["blocks"] = tuple(parts[str(place)] for place in range(len(parts)))
    return whole


def completed(
    trained: Mapping[str, Any], start: Mapping[str, Any], config: TrainConfig, model: ModelConfig
) -> dict[str, Any]:
    """The parameters that were trained, with all layers stacked, of which the frozen ones are those
    of `start`, the parameters that the training started from."""
    flat, before = by_path(trained), by_path(start)
    if config.mixture.trained == "router":
        return unflatten_dict({**before, **flat}, sep="/")
    found = {path: leaf for path, leaf in flat.items() if not stacked(path)}
    for path in before:
        if stacked(path):
            parts = [
                before[path][first:last]
                if is_frozen
                else flat[f"blocks/{place}/{path.removeprefix('blocks/')}"]
                for place, (first, last, is_frozen) in enumerate(stacks(config, model))
            ]
            found[path] = jnp.concatenate(parts)
    return unflatten_dict(found, sep="/")


def pulled(masters: Any, start: Any, config: TrainConfig, rate: Any) -> Any:
    """Parameters after a step, pulled to those that the training started from: x becomes
    (x + r p s) / (1 + r p), for learning rate r, `optimizer.pull` p and start s. That is the exact
    minimum of |y - x|^2 / 2 + r p |y - s|^2 / 2, so that it is stable for any pull."""
    if config.optimizer.pull is None:
        return masters
    share = rate * config.optimizer.pull
    return jax.tree.map(lambda x, s: (x + share * s) / (1 + share), masters, start)


def cast(parameters: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Parameters with matrices in a dtype."""
    return jax.tree.map(lambda x, m: x.astype(dtype) if m else x, parameters, matrices(parameters))


def _new_factors(parameters, config, model, random_seed):
    assert config.lora.rank is not None
    rank, weights, factors = config.lora.rank, by_path(parameters), {}
    for number, path in enumerate(chosen_targets(config.lora.targets, model)):
        layers, inputs, outputs = weights[f"{path}/weight"].shape
        key = jax.random.fold_in(jax.random.key(random_seed), number)
        within = inputs**-0.5
        first = jax.random.uniform(key, (layers, inputs, rank), jnp.float32, -within, within)
        factors[path] = first, jnp.zeros((layers, rank, outputs), jnp.float32)
    return as_parameters(factors)


def axes_of(path: str, known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Names of the dimensions of a parameter in the trees of `divide`. known: those of the model's
    parameters by path."""
    parts = path.split("/")
    if len(parts) > 1 and parts[1].isdigit():  # a stack of layers
        parts = [parts[0], *parts[2:]]
    if parts[-1] in (A, B):
        axes = known["/".join([*parts[:-1], "weight"])]
        return (*axes[:-1], "rank") if parts[-1] == A else (axes[0], "rank", axes[-1])
    return known["/".join(parts)]
