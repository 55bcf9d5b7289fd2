"""Attention by the kernels of a device, for `benchmarks/gpu.py`: is it right, and how fast?"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gpu_sizes import Row, Rows, Sizes

from xelm.models.attention import attend
from xelm.models.config import ModelConfig
from xelm.models.fused_attention import fused_attention, on_one_device
from xelm.models.target import target_of

ERROR = 1e-2
"""Norm of the difference to the reference over that of the reference, at most: eight bits of
bfloat16 and sums of many products give .004."""


class Case(NamedTuple):
    """What a layer needs of attention."""

    groups: int = 1
    """Heads of queries for each of keys."""
    divided: int = 1
    """Divisor of the size of heads."""
    causal: bool = True
    window: int | None = None
    cap: float | None = None
    documents: bool = True
    """Whether rows have several documents and padding, or one."""

    def model(self, sizes: Sizes) -> ModelConfig:
        """A model with such layers."""
        _, length, heads, size = sizes.attention
        return replace(
            sizes.model("XGLM 1.7B"),
            **{"head_count": heads, "head_size": size // self.divided, "causal": self.causal},
            **{"key_head_count": heads // self.groups, "attention_cap": self.cap},
            **{"local_window": self.window, "local_layers": (0,) if self.window else ()},
            **{"max_length": length, "attention_scale": None},
        )


CASES = {
    "documents": Case(),
    "one document": Case(documents=False),
    "heads in groups": Case(groups=2),
    "heads of half the size": Case(divided=2),
    "window": Case(window=100),
    "encoder": Case(causal=False),
    "cap": Case(cap=2.0),
}
"""What is compared with the reference."""


def kernels(sizes: Sizes) -> Rows:
    """Whether attention as the training step would compute it here, values and gradients, agrees
    with the reference in float32."""
    for name, case in CASES.items():
        try:
            yield {"case": name, **_compared(case, sizes)}
        except Exception as error:  # the other cases are to be compared in any case
            yield {"case": name, "agrees": False, "error": _line(error)}


def _compared(case: Case, sizes: Sizes) -> Row:
    model = case.model(sizes)
    inputs, segments = _inputs(model, sizes, case.documents)
    way, ours = _chosen(model, segments)
    plain = [array.astype(jnp.float32) for array in inputs]
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(_both_ways(_reference(model, segments)))(*plain)
    found = jax.jit(_both_ways(ours))(*inputs)
    parts = zip(("value", "by query", "by key", "by value"), found, wanted, strict=True)
    errors, largest = {}, 0.0
    for part, one, other in parts:
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        errors[f"error {part}"] = float(np.linalg.norm(one - other) / np.linalg.norm(other))
        largest = max(largest, float(np.abs(one - other).max()))
    agrees = all(error <= ERROR for error in errors.values())  # not where one is nan
    return {"way": way, "agrees": agrees, "largest difference": largest, **errors}


def _inputs(model: ModelConfig, sizes: Sizes, documents: bool) -> tuple[list[Any], Any]:
    """Queries, keys, values and the gradient of what becomes of them, bfloat16; and segments."""
    batch, length, heads, _ = sizes.attention
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (heads, model.key_head_count, model.key_head_count, heads)
    shapes = [(batch, length, count, model.head_size) for count in counts]
    inputs = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes)]
    ends = np.asarray([0.3, 0.37, 0.9]) * length if documents else []
    segments = 1 + np.searchsorted(ends, np.arange(length), side="right")
    if documents:
        segments[segments == 4] = 0  # padding
    return inputs, jnp.broadcast_to(jnp.asarray(segments, jnp.int32), (batch, length))


def _chosen(model: ModelConfig, segments: Any) -> tuple[str, Callable[..., Any]]:
    """Attention as a layer of the training step computes it here, and what that is."""
    target = target_of(jax.devices())
    fused = fused_attention(model, target, jnp.bfloat16, segments, on_one_device)
    if fused is None:
        return "blocks of queries", _reference(model, segments)
    way = {"gpu": "cuDNN", "tpu": "Pallas"}[target.platform]
    local = jnp.asarray(bool(model.local_layers))
    return way, lambda query, key, value: fused(query, key, value, local)


def _reference(model: ModelConfig, segments: Any) -> Callable[..., Any]:
    place = jnp.arange(segments.shape[1])
    apart = place[:, None] - place[None]
    mask = segments[:, :, None] == segments[:, None, :]
    mask = mask & (jnp.abs(apart) < (model.local_window or len(place)))[None]
    mask = mask & ((apart >= 0) | (not model.causal))[None]

    def compute(query, key, value):
        key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
        scale, cap = model.head_size**-0.5, model.attention_cap
        form = {"causal": model.causal, "window": model.local_window}
        return attend(query, key, value, mask, scale=scale, cap=cap, **form)

    return compute


def _both_ways(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(query, key, value, cotangent):
        found, back = jax.vjp(function, query, key, value)
        return found, *back(cotangent)

    return run


def attention(sizes: Sizes) -> Rows:
    """Time of attention, forward and backward, by the ways in which it can be computed."""
    model = CASES["documents"].model(sizes)
    inputs, segments = _inputs(model, sizes, documents=True)
    scale = model.head_size**-0.5
    cudnn = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, scale=scale, implementation="cudnn"
    )

    def pallas(query, key, value):
        # Here, since an example may move.
        from jax.experimental.pallas.ops.gpu.attention import mha

        return mha(query, key, value, segments, sm_scale=scale, causal=True)

    ways = {
        "as the training step": _chosen(model, segments)[1],
        "blocks of queries": _reference(model, segments),
        "cuDNN, one document": cudnn,
        "example of Pallas": pallas,
    }
    batch, length, heads, size = sizes.attention
    # Two products of two operations forward, thrice that in all, of half the pairs.
    flops = 12 * heads * size * batch * length * (length + 1) / 2
    for name, function in ways.items():
        try:
            call = functools.partial(jax.jit(_both_ways(function)), *inputs)
            seconds = _seconds(call, sizes)
            yield {"case": name, "seconds": seconds, "flops_a_second": flops / seconds}
        except Exception as error:  # what this device has no kernel for
            yield {"case": name, "error": _line(error)}


def _seconds(call: Callable[[], Any], sizes: Sizes) -> float:
    """Seconds of a call among many, the median of three rounds."""
    jax.block_until_ready(call())
    found = []
    for _ in range(3):
        begun = time.perf_counter()
        jax.block_until_ready([call() for _ in range(sizes.steps)])
        found.append((time.perf_counter() - begun) / sizes.steps)
    return statistics.median(found)


def _line(error: Exception) -> str:
    """The kind and the first line of an error."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"
