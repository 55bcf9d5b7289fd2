"""Methods of merging: how one tensor is made of the same tensor of several models.

`METHODS` is the table of them. A method computes in float64 and reads one model's tensor at a time,
so that memory does not grow with the number of models. Files are read and written in `merge`.

With base b and task vectors v_i = x_i - b, weights w_i and scale s:

    linear           sum w_i x_i / sum w_i
    task-arithmetic  b + s sum w_i v_i
    ties             b + s times the mean of trimmed v_i that have the elected sign
    dare-linear      b + s sum w_i drop(v_i)
    dare-ties        b + s times the mean of drop(v_i) that have the elected sign
    slerp            the point of the arc from x_1 to x_2 at w_2 / (w_1 + w_2)
    model-stock      b + t mean v_i, with t from the mean angle between the v_i
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clustering.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """One tensor of the models that are merged, and the parameters of the method."""

    models: Sequence[np.ndarray]
    """The tensor of each model in float64; it may be read from a file whenever it is indexed."""
    weights: Sequence[float]
    """Weight of each model, as given: they need not sum to 1."""
    base: np.ndarray | None = None
    """The tensor of the base of task vectors; None for methods without a base."""
    scale: float = 1.0
    """Factor of the merged task vector (lambda of the papers)."""
    density: float = 1.0
    """Share of the entries of a task vector that are kept."""
    random_seed: int = 0
    """Random seed of the entries that are dropped."""
    name: str = ""
    """Name of the tensor; each tensor of each model has its own random numbers."""

    def task_vectors(self) -> Iterator[np.ndarray]:
        """Model minus base, for each model."""
        assert self.base is not None
        return (self.models[i] - self.base for i in range(len(self.models)))

    def trimmed(self) -> Iterator[np.ndarray]:
        """Task vectors of which only the entries of largest magnitude are kept (TIES)."""
        return (_largest(vector, self.density) for vector in self.task_vectors())

    def dropped(self) -> Iterator[np.ndarray]:
        """Task vectors of which random entries are kept, divided by the density (DARE)."""
        for number, vector in enumerate(self.task_vectors()):
            key = [self.random_seed, zlib.crc32(self.name.encode()), number]
            kept = np.random.default_rng(key).random(vector.shape) < self.density
            yield np.where(kept, vector / self.density, 0.0)


def linear(x: Inputs) -> np.ndarray:
    """Weighted mean of the models: "model soups" (Wortsman et al. 2022, arXiv 2203.05482)."""
    total = np.zeros_like(x.models[0])
    whole = math.fsum(x.weights)
    for number, weight in enumerate(x.weights):
        if weight:
            total += weight / whole * x.models[number]
    return total


def task_arithmetic(x: Inputs) -> np.ndarray:
    """Base plus the scaled sum of weighted task vectors (Ilharco et al. 2023, arXiv 2212.04089,
    section 2). The weights, which the paper does not have, are 1 unless given."""
    return _base(x) + x.scale * _weighted_sum(x, x.task_vectors())


def ties(x: Inputs) -> np.ndarray:
    """Base plus the scaled disjoint mean of trimmed task vectors (TIES; Yadav et al. 2023, arXiv
    2306.01708, algorithm 1). Entries are trimmed in each tensor by itself, where the paper trims
    the whole model at once; weights count in the election and in the mean."""
    return _base(x) + x.scale * _disjoint_mean(x, x.trimmed)


def dare_linear(x: Inputs) -> np.ndarray:
    """Task arithmetic of task vectors of which random entries are dropped and the others divided by
    the density, which keeps the expectation (DARE; Yu et al. 2024, arXiv 2311.03099, section
    3.2)."""
    return _base(x) + x.scale * _weighted_sum(x, x.dropped())


def dare_ties(x: Inputs) -> np.ndarray:
    """TIES with the random dropping of DARE in place of trimming (Yu et al. 2024, arXiv 2311.03099,
    section 3.3)."""
    return _base(x) + x.scale * _disjoint_mean(x, x.dropped)


def slerp(x: Inputs) -> np.ndarray:
    """Spherical linear interpolation of two models, each tensor as one vector (Shoemake 1985, doi
    10.1145/325165.325242): t = w_2 / (w_1 + w_2) is 0 at the first model and 1 at the second. On a
    line through 0, where there is no arc, it is linear."""
    first, second = x.models[0], x.models[1]
    t = x.weights[1] / math.fsum(x.weights)
    lengths = np.linalg.norm(first), np.linalg.norm(second)
    if not all(lengths):
        return (1 - t) * first + t * second
    one, other = first / lengths[0], second / lengths[1]
    # Exact for small angles too, unlike the arc cosine of the dot product (Kahan).
    angle = 2 * math.atan2(np.linalg.norm(one - other), np.linalg.norm(one + other))
    if math.sin(angle) < 1e-12:
        return (1 - t) * first + t * second
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def model_stock(x: Inputs) -> np.ndarray:
    """Point between the base and the mean of n models that is nearest to the centre of the
    distribution they come from (model stock; Jang et al. 2024, arXiv 2403.19522, equation 4): b + t
    mean v_i with t = n c / (1 + (n - 1) c) and c the mean cosine of pairs of task vectors, in each
    tensor. A mean cosine below 0, for which the paper has no model, counts as 0."""
    count, base = len(x.models), _base(x)
    total, directions, moved = np.zeros_like(base), np.zeros_like(base), 0
    for vector in x.task_vectors():
        length = np.linalg.norm(vector)
        total += vector
        directions += vector / (length or 1.0)
        moved += length > 0
    # |sum of unit vectors|^2 is their number plus the cosines of all ordered pairs.
    cosine = max(0.0, (float((directions**2).sum()) - moved) / (count * (count - 1)))
    t = count * cosine / (1 + (count - 1) * cosine)
    return base + t * total / count


def _base(x: Inputs) -> np.ndarray:
    assert x.base is not None
    return x.base


def _weighted_sum(x: Inputs, vectors: Iterator[np.ndarray]) -> np.ndarray:
    total = np.zeros_like(_base(x))
    for weight, vector in zip(x.weights, vectors, strict=True):
        total += weight * vector
    return total


def _disjoint_mean(x: Inputs, vectors: Callable[[], Iterator[np.ndarray]]) -> np.ndarray:
    """Weighted mean, entry by entry, of the vectors whose sign is that of the weighted sum of all;
    a sum of 0 counts as positive. Two passes, so that no more than one vector is in memory."""
    elected = np.where(_weighted_sum(x, vectors()) >= 0, 1.0, -1.0)
    total, weight_sum = np.zeros_like(elected), np.zeros_like(elected)
    for weight, vector in zip(x.weights, vectors(), strict=True):
        chosen = np.sign(vector) == elected
        total += np.where(chosen, weight * vector, 0.0)
        weight_sum += np.where(chosen, weight, 0.0)
    return total / np.where(weight_sum == 0, 1.0, weight_sum)


def _largest(vector: np.ndarray, density: float) -> np.ndarray:
    """The vector with zeros but for this share of its entries, at least one, of largest
    magnitude."""
    kept = max(1, int(density * vector.size))
    if kept >= vector.size:
        return vector
    places = np.argpartition(np.abs(vector), vector.size - kept, axis=None)[-kept:]
    trimmed = np.zeros_like(vector)
    trimmed.flat[places] = vector.flat[places]
    return trimmed


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One method of merging: what computes it, and which parameters it takes."""

    combine: Callable[[Inputs], np.ndarray]
    """Function that makes one tensor of several."""
    summary: str
    """Description for users."""
    paper: str
    """Source: authors, year and address."""
    has_base: bool = True
    """Whether it works on differences from a base."""
    has_weights: bool = True
    """Whether models may have different weights."""
    subtracts: bool = False
    """Whether weights may be negative, which takes away what a model has learned."""
    scale: float | None = None
    """Default of `scale`; None: the method takes none."""
    density: float | None = None
    """Default of `density`; None: the method takes none."""
    random: bool = False
    """Whether it draws random numbers."""
    least: int = 1
    """Smallest number of models."""
    most: int | None = None
    """Largest number of models; None: no limit."""
    by_entry: bool = True
    """Whether an entry that is equal in all models and the base stays as it is."""


METHODS = {
    "linear": Method(
        combine=linear,
        summary="weighted mean of the weights",
        paper="Wortsman et al. 2022, https://arxiv.org/abs/2203.05482",
        has_base=False,
    ),
    "task-arithmetic": Method(
        combine=task_arithmetic,
        summary="base plus the scaled sum of differences from it",
        paper="Ilharco et al. 2023, https://arxiv.org/abs/2212.04089",
        subtracts=True,
        scale=0.4,
    ),
    "ties": Method(
        combine=ties,
        summary="largest differences only, averaged where their signs agree",
        paper="Yadav et al. 2023, https://arxiv.org/abs/2306.01708",
        scale=1.0,
        density=0.2,
    ),
    "dare-linear": Method(
        combine=dare_linear,
        summary="task arithmetic of randomly thinned differences",
        paper="Yu et al. 2024, https://arxiv.org/abs/2311.03099",
        subtracts=True,
        scale=0.4,
        density=0.5,
        random=True,
    ),
    "dare-ties": Method(
        combine=dare_ties,
        summary="randomly thinned differences, averaged where their signs agree",
        paper="Yu et al. 2024, https://arxiv.org/abs/2311.03099",
        scale=1.0,
        density=0.5,
        random=True,
    ),
    "slerp": Method(
        combine=slerp,
        summary="point on the arc between two models",
        paper="Shoemake 1985, https://doi.org/10.1145/325165.325242",
        has_base=False,
        least=2,
        most=2,
        by_entry=False,
    ),
    "model-stock": Method(
        combine=model_stock,
        summary="mean, drawn to the base the more the differences disagree",
        paper="Jang et al. 2024, https://arxiv.org/abs/2403.19522",
        has_weights=False,
        least=2,
    ),
}
# Scales and the density of TIES without text to choose them on: Yadav et al. 2023, section 6. The
# density of DARE is the middle of what its paper tries.
"""Methods of merging by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeOptions:
    """How models are merged; UserError for what a method does not take."""

    method: str = "linear"
    """Method of merging, as listed below."""
    scale: float | None = None
    """Factor of the merged difference from the base. None: .4 for task-arithmetic and dare-linear,
    1 for ties and dare-ties."""
    density: float | None = None
    """Share of each difference from the base that is kept. None: .2 for ties, .5 for dare-linear
    and dare-ties."""
    random_seed: int | None = None
    """Random seed of dare-linear and dare-ties. None: 0."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"unknown method {self.method!r}; there are: {', '.join(METHODS)}")
        takes = {
            name: [method for method, one in METHODS.items() if name in parameters_of(one)]
            for name in ("scale", "density", "random_seed")
        }
        for name, methods in takes.items():
            if getattr(self, name) is not None and self.method not in methods:
                raise UserError(
                    f"{name} has no effect on {self.method}; it goes with {', '.join(methods)}"
                )
        if self.scale is not None and not math.isfinite(self.scale):
            raise UserError(f"scale must be a finite number; got {self.scale}")
        if self.density is not None and not 0 < self.density <= 1:
            raise UserError(f"density must be above 0 and at most 1; got {self.density}")
        if self.random_seed is not None and self.random_seed < 0:
            raise UserError(f"random_seed must be at least 0; got {self.random_seed}")

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters that the method takes -> their values."""
        defaults = parameters_of(METHODS[self.method])
        given = {name: getattr(self, name) for name in defaults}
        return {name: defaults[name] if given[name] is None else given[name] for name in defaults}


def parameters_of(method: Method) -> dict[str, Any]:
    """Parameters that a method takes, beside weights and base, with their defaults."""
    found = {"scale": method.scale, "density": method.density}
    found["random_seed"] = 0 if method.random else None
    return {name: value for name, value in found.items() if value is not None}


def check_models(options: MergeOptions, weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights of so many models, which are equal unless given: of methods with a base they are
    used as they are (1 each unless given), of others scaled to sum 1. UserError for a number of
    models or weights that the method does not take."""
    method, name = METHODS[options.method], options.method
    if count < method.least or (method.most is not None and count > method.most):
        wanted = f"exactly {method.most}" if method.most else f"{method.least} or more"
        raise UserError(f"{name} merges {wanted} models; got {count}")
    given = [1.0] * count if weights is None else list(weights)
    listed = ", ".join(map(str, given))
    if weights is not None and not method.has_weights:
        raise UserError(f"{name} takes no weights; got {listed}")
    if len(given) != count:
        raise UserError(f"there should be one weight for each of {count} models; got {listed}")
    if not all(map(math.isfinite, given)):
        raise UserError(f"weights must be finite; got {listed}")
    if not method.subtracts and not (min(given) >= 0 and math.fsum(given) > 0):
        raise UserError(f"weights of {name} must not be negative nor all zero; got {listed}")
    whole = 1.0 if method.has_base else math.fsum(given)
    return [weight / whole for weight in given]
