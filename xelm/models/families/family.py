"""Definition of a family of checkpoints: how its config.json is read, and a table from tensor names
to our parameters. Imports no JAX."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clustering.errors import UserError
from xelm.models.config import Activation, ModelConfig, Rope

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Our names of activations by their names on the Hub."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One tensor of a checkpoint, which holds one of our parameters or several."""

    paths: tuple[str, ...]
    """Paths of our parameters, with slashes between their parts."""
    inputs_first: bool = False
    """Whether weights are stored as [inputs, outputs], like ours, and not the other way round."""
    by_head: bool = False
    """Whether queries, keys and values are stored key head by key head (its queries, its key and
    its value, then those of the second), and not one after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """All checkpoints of one `model_type` of the Hub."""

    read: Callable[[Any], ModelConfig]
    """Turns transformers' configuration into a ModelConfig; refuses unsupported settings."""
    write: Callable[[ModelConfig], dict[str, Any]] | None = None
    """Turns a ModelConfig into a config.json; None if no new seeds are made in this family."""
    tensors: Mapping[str, Tensor]
    """Tensors by name; `{}` stands for the layer number."""
    prefix: str = ""
    """Start of most tensor names, left out in checkpoints that were saved without a head."""
    ignored: tuple[str, ...] = ()
    """Parts of the names of tensors that some checkpoints have and a language model never uses."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensor that some checkpoints have twice -> the one that it must equal; beside a tied head."""
    with_head: str = ""
    """An encoder's checkpoint on the Hub that has its masked-language-model head."""
    variant: Callable[[Any], "Family"] | None = None
    """Function of transformers' configuration that returns the family with the tensors of such a
    checkpoint; None: those of this one, whatever the configuration."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Ends of tensor names in old checkpoints, with the ends that the table has instead."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """Tensors of a single value that is the same in all checkpoints; `{}`: number of the layer."""
    starts: Mapping[str, str] = field(default_factory=dict)
    """Starts of tensor names in checkpoints of more than a text model, with those of the table."""

    def name(self, stored: str, prefixed: bool) -> str:
        """The table's name of a stored tensor. prefixed: whether stored names have the prefix."""
        for old, new in self.renamed.items():
            if stored.endswith(old):
                stored = stored.removesuffix(old) + new
        for old, new in self.starts.items():
            if stored.startswith(old):
                return new + stored.removeprefix(old)
        return stored if prefixed or not self.prefix else self.prefix + stored


def linear(name: str, *paths: str, bias: bool = True, **layout: bool) -> dict[str, Tensor]:
    """Rows of the table for a dense layer, or for several that are stored as one."""
    ends = ("weight", "bias") if bias else ("weight",)
    return {
        f"{name}.{end}": Tensor(paths=tuple(f"{path}/{end}" for path in paths), **layout)
        for end in ends
    }


def norm(name: str, path: str) -> dict[str, Tensor]:
    """Rows of the table for a norm's scale and bias."""
    return {
        f"{name}.weight": Tensor(paths=(f"{path}/scale",)),
        f"{name}.bias": Tensor(paths=(f"{path}/bias",)),
    }


def table(name: str, path: str) -> dict[str, Tensor]:
    """Row of the table for an embedding, or for a bias without a weight."""
    return {name: Tensor(paths=(path,))}


def without(tensors: Mapping[str, Tensor], *parts: str) -> dict[str, Tensor]:
    """The rows of a table whose names have none of these parts: for a family that has other names
    in their place, since each parameter has one row."""
    return {name: row for name, row in tensors.items() if not any(part in name for part in parts)}


QKV = ("blocks/query", "blocks/key", "blocks/value")

BIASED: Mapping[str, Any] = {"norm": "layer", "gated": False} | dict.fromkeys(
    ("norm_bias", "query_bias", "output_bias", "feedforward_bias"), True
)
"""Settings of the families from before Llama, decoders and encoders."""


def shape(hub: Any) -> dict[str, Any]:
    """Settings that every configuration of transformers has under the same names."""
    width, heads = hub.hidden_size, hub.num_attention_heads
    return {
        "vocabulary_size": hub.vocab_size,
        "width": width,
        "layer_count": hub.num_hidden_layers,
        "head_count": heads,
        "key_head_count": heads,
        "head_size": width // heads,
        "tie_embeddings": hub.tie_word_embeddings,
    }


def want(name: str, value: Any, known: Sequence[Any]) -> Any:
    """Returns `value`; UserError unless it is one of those known."""
    if value not in known:
        wanted = " or ".join(map(str, known))
        raise UserError(f"{name} must be {wanted} for this model; config.json has {value}")
    return value


def require(hub: Any, **settings: Any) -> None:
    """Raises UserError unless a configuration has these settings."""
    for name, value in settings.items():
        want(name, getattr(hub, name), [value])


def number(name: str, value: Any) -> float:
    """Returns `value` as a float; UserError unless it is a number."""
    if not isinstance(value, int | float):
        raise UserError(f"{name} must be a number; config.json has {value}")
    return float(value)


def activation(name: str, value: str) -> Activation:
    """Our name of an activation; UserError if it is not known."""
    return ACTIVATIONS[want(name, value, list(ACTIVATIONS))]


def rope(found: Mapping[str, Any], *, partial: bool = False, interleaved: bool = False) -> Rope:
    """Settings of rotary positions, of all layers or of one kind of them. partial: whether
    transformers' model of this family reads `partial_rotary_factor`. interleaved: as in `Rope`."""
    kinds = ["default", "linear", "llama3", "yarn"]
    kind = want("rope_type", found["rope_type"], kinds)
    theta = number("rope_theta", found["rope_theta"])
    share = found.get("partial_rotary_factor", 1.0)
    if not partial:
        want("partial_rotary_factor", share, [1.0])
    settings: dict[str, Any] = {
        **{"theta": theta, "partial_rotary_factor": share},
        "interleaved": interleaved,
    }
    if kind != "default":
        settings |= {"scaling": kind, "factor": number("factor", found["factor"])}
    if kind in ("llama3", "yarn"):
        settings["original_length"] = found["original_max_position_embeddings"]
    if kind == "llama3":
        settings["slowest"] = float(found["low_freq_factor"])
        settings["fastest"] = float(found["high_freq_factor"])
    if kind == "yarn":
        settings["slowest"] = float(found.get("beta_slow") or 1)
        settings["fastest"] = float(found.get("beta_fast") or 32)
        settings["truncate"] = found.get("truncate", True)
        settings["amplitude"] = _yarn_amplitude(found, settings["factor"])
    return Rope(**settings)


def rope_of(hub: Any, kind: str) -> Rope:
    """Settings of rotary positions of one kind of layers, a value of `layer_types`."""
    found = hub.rope_parameters[kind]
    # transformers looks for it beside the kinds of layers, and rounds whatever is said here.
    want("truncate", found.get("truncate", True), [True])
    return rope(found)


def _yarn_amplitude(found: Mapping[str, Any], factor: float) -> float:
    """Factor of cosines and sines (Peng et al. 2023, eq. 22), or DeepSeek's quotient of two."""
    if found.get("attention_factor") is not None:
        return float(found["attention_factor"])

    def grown(share: float) -> float:
        return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0

    share, all_share = found.get("mscale"), found.get("mscale_all_dim")
    return grown(share) / grown(all_share) if share and all_share else grown(1.0)


def all_local(hub: Any) -> dict[str, Any]:
    """Settings of a model in which all layers see only a window, or none does."""
    kind = "full_attention" if hub.sliding_window is None else "sliding_attention"
    return local(hub.sliding_window, [kind] * hub.num_hidden_layers)


def local(window: int | None, kinds: Sequence[str]) -> dict[str, Any]:
    """Settings of a model whose layers of kind "sliding_attention" see only a window."""
    for kind in kinds:
        want("layer_types", kind, ["full_attention", "sliding_attention"])
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    if not layers:
        return {}
    if window is None:
        raise UserError(
            "sliding_window must be a number if layer_types has sliding_attention; config.json has "
            "None"
        )
    return {"local_window": window, "local_layers": layers}
