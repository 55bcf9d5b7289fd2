"""A mixture of experts made of models of one shape (Branch-Train-MiX: Sukhbaatar et al. 2024, arXiv
2403.07816): their feed-forwards side by side, the mean of all else, and routers to begin with."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Float

from xelm.models.config import ModelConfig
from xelm.models.parameters import by_path

_FEEDFORWARD = ("blocks/gate/", "blocks/up/", "blocks/down/")
RIDGE = 0.01
"""What is added to the diagonal of a covariance, as a share of its mean: directions in which the
states hardly vary would decide everything."""


class Moments(NamedTuple):
    """What the router of each layer sees of the text of one expert, L layers."""

    count: int
    """Number of tokens."""
    sums: Float[np.ndarray, "L D"]
    """Sum of the inputs of the feed-forward."""
    products: Float[np.ndarray, "L D D"]
    """Sum of their products with themselves."""


def mixture_shape(model: ModelConfig, experts: int, per_token: int) -> ModelConfig:
    """The shape of a mixture of so many models of a shape."""
    return replace(model, expert_count=experts, experts_per_token=per_token)


def mean_of(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of the parameters of several models, float32. `models` may load each one when it is
    indexed."""
    total: dict[str, np.ndarray] = {}
    for model in models:
        for path, array in by_path(model).items():
            part = np.asarray(array, np.float64)
            total[path] = part + total[path] if path in total else part
    mean = {path: (array / len(models)).astype(np.float32) for path, array in total.items()}
    return unflatten_dict(mean, sep="/")


def with_feedforward(mean: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters `mean` with the feed-forwards of a model: what the mixture is for a token that
    is routed to this model in all layers."""
    own = {p: a for p, a in by_path(model).items() if p.startswith(_FEEDFORWARD)}
    return unflatten_dict({**by_path(mean), **own}, sep="/")


def mixed(
    mean: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    routers: Float[np.ndarray, "L D E"],
) -> dict[str, Any]:
    """The parameters of the mixture of some models with this mean."""
    found = {p: a for p, a in by_path(mean).items() if not p.startswith(_FEEDFORWARD)}
    for number, model in enumerate(models):
        for path, array in by_path(model).items():
            if path.startswith(_FEEDFORWARD):
                name = path.replace("blocks/", f"blocks/expert_{number}/")
                found[name] = np.asarray(array, np.float32)
    found["blocks/router/weight"] = np.asarray(routers, np.float32)
    return unflatten_dict(found, sep="/")


def discriminants(moments: Sequence[Moments]) -> Float[np.ndarray, "L D E"]:
    """Routers that tell the texts of E experts apart: linear discriminant analysis (Fisher 1936) in
    each layer, a closed form.

    With mean m_e of the inputs x of the feed-forward over the text of each expert, and C their
    covariance around it, a router's logit is m_e' C^-1 x - m_e' C^-1 m_e / 2: the log of the
    expert's probability, were all texts equally frequent and normally distributed. A router has no
    constant; in its place stands the linear function of x that is nearest to 1 over all texts. The
    mean over experts, which changes no probability, is subtracted."""
    means = np.stack([m.sums / m.count for m in moments], axis=1)  # [L, E, D]
    squares = np.mean([m.products / m.count for m in moments], axis=0)
    within = squares - np.einsum("LED,LEF->LDF", means, means) / len(moments)
    size = means.shape[-1]

    def ridged(matrix):
        spread = np.trace(matrix, axis1=1, axis2=2)[:, None, None] / size
        return matrix + RIDGE * spread * np.eye(size)

    weights = np.linalg.solve(ridged(within), means.swapaxes(1, 2))  # [L, D, E]
    constants = np.einsum("LED,LDE->LE", means, weights) / -2
    one = np.linalg.solve(ridged(squares), means.mean(axis=1)[:, :, None])
    weights = weights + one * constants[:, None]
    return weights - weights.mean(axis=2, keepdims=True)
