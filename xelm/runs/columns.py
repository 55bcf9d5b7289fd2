"""Columns of the learned router for new experts, fitted without moving those of the others."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize

PENALTY = 100.0
"""Inverse strength of the L2 penalty (`C` of scikit-learn), of the fit of all columns too."""


def balanced(labels: Int[np.ndarray, " N"], experts: int) -> Float[np.ndarray, " N"]:
    """Weights of the examples by which every expert counts the same, as scikit-learn's
    "balanced"."""
    counts = np.maximum(np.bincount(labels, minlength=experts), 1)
    return len(labels) / (experts * counts[labels])


def added_columns(
    features: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, " N"],
    known: Sequence[int],
    weights: Float[np.ndarray, "D K"],
    bias: Float[np.ndarray, " K"],
    experts: int,
) -> tuple[Float[np.ndarray, "D E"], Float[np.ndarray, " E"]]:
    """Weights and bias of logistic regression over E experts, of which K columns are given and stay
    as they are to the bit.

    labels: index of the expert of each example. known: indices of the experts of the given columns.
    The other columns minimise the same convex loss as a fit of all would, with the given ones
    fixed: cross-entropy over all E experts, each of which counts the same, and an L2 penalty on the
    weights.
    """
    new = [number for number in range(experts) if number not in known]
    scores = features @ np.asarray(weights, float) + np.asarray(bias, float)
    fixed, counts = np.logaddexp.reduce(scores, axis=1), PENALTY * balanced(labels, experts)
    # The logit of an example's own expert matters where that is a new one; else it is a constant.
    own = labels[:, None] == np.asarray(new)
    width, size = len(new), features.shape[1]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        columns = flat.reshape(size + 1, width)
        logits = features @ columns[:-1] + columns[-1]
        total = np.logaddexp(fixed, np.logaddexp.reduce(logits, axis=1))
        value = counts @ (total - np.where(own, logits, 0.0).sum(axis=1))
        error = counts[:, None] * (np.exp(logits - total[:, None]) - own)
        slope = np.concatenate([features.T @ error + columns[:-1], error.sum(axis=0)[None]])
        return float(value + 0.5 * (columns[:-1] ** 2).sum()), slope.ravel()

    start = np.zeros((size + 1) * width)
    options = {"maxiter": 1000, "maxfun": 10_000, "ftol": 1e-12, "gtol": 1e-4}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    found = found.reshape(size + 1, width)
    all_weights = np.zeros((size, experts), np.float32)
    all_bias = np.zeros(experts, np.float32)
    all_weights[:, list(known)], all_bias[list(known)] = weights, bias
    all_weights[:, new], all_bias[new] = found[:-1], found[-1]
    return all_weights, all_bias
