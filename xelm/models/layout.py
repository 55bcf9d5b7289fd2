"""The layout of our parameters in the tensors of a checkpoint, on plain arrays: our weights are
[inputs, outputs], most checkpoints' [outputs, inputs], and some put several into one tensor."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xelm.models.families.family import Tensor

Range = tuple[int, int]
"""First index and the index after the last."""


def stored_shape(tensor: Tensor, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """Shape of a tensor in the checkpoint, given the shapes of its parameters by path."""
    parts = [shapes[path] for path in tensor.paths]
    outputs = sum(shape[-1] for shape in parts)
    if not _is_weight(tensor):
        return (*parts[0][:-1], outputs)
    return (parts[0][0], outputs) if tensor.inputs_first else (outputs, parts[0][0])


def take(
    stored: Any,
    tensor: Tensor,
    path: str,
    shapes: Mapping[str, Sequence[int]],
    ranges: Sequence[Range],
    head_size: int,
) -> np.ndarray:
    """The part `ranges` of our parameter `path`. No more of `stored` (an array, or a lazy slice of
    one) is read than that takes."""
    place = tensor.paths.index(path)
    begin, end = ranges[-1]
    if tensor.by_head:
        # Whole groups are read, of all parameters, and one parameter's rows picked from them.
        widths = _group_widths([shapes[each][-1] for each in tensor.paths], head_size)
        own, whole, before = widths[place], sum(widths), sum(widths[:place])
        first, last = begin // own, -(-end // own)
        found = _oriented(stored, tensor, (*ranges[:-1], (first * whole, last * whole)))
        found = found.reshape(*found.shape[:-1], last - first, whole)[..., before : before + own]
        found = found.reshape(*found.shape[:-2], -1)
        return found[..., begin - first * own : end - first * own]
    offset = sum(shapes[earlier][-1] for earlier in tensor.paths[:place])
    return _oriented(stored, tensor, (*ranges[:-1], (begin + offset, end + offset)))


def join(tensor: Tensor, arrays: Sequence[np.ndarray], head_size: int) -> np.ndarray:
    """The tensor of a checkpoint made of these parameters, contiguous."""
    if tensor.by_head:
        widths = _group_widths([a.shape[-1] for a in arrays], head_size)
        groups = [a.reshape(*a.shape[:-1], -1, own) for a, own in zip(arrays, widths)]
        joined = np.concatenate(groups, axis=-1)
        joined = joined.reshape(*arrays[0].shape[:-1], -1)
    else:
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)
    turned = _is_weight(tensor) and not tensor.inputs_first
    return np.ascontiguousarray(joined.T if turned else joined)


def _group_widths(outputs: Sequence[int], head_size: int) -> list[int]:
    """Number of outputs that each parameter has in the group of one key head."""
    groups = min(outputs) // head_size
    return [size // groups for size in outputs]


def _oriented(stored: Any, tensor: Tensor, ranges: Sequence[Range]) -> np.ndarray:
    if _is_weight(tensor) and not tensor.inputs_first:
        (a, b), (c, d) = ranges
        return stored[c:d, a:b].T
    return stored[tuple(slice(*part) for part in ranges)]


def _is_weight(tensor: Tensor) -> bool:
    return tensor.paths[0].endswith("/weight")
