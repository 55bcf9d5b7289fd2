"""What a family of checkpoints is: what its config.json means to us, and a table from tensor names
to our parameters. Imports no JAX."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clustering.errors import UserError
from xelm.models.config import Activation, ModelConfig, Rope

# Their names on the Hub.
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One tensor of a checkpoint, which holds one of our parameters or several side by side."""

    paths: tuple[str, ...]
    """Our parameters, slashes between the parts of each path."""
    inputs_first: bool = False
    """Weights are stored as [inputs, outputs], as ours are; usually it is the other way round."""
    by_head: bool = False
    """Several parameters lie head by head (query, key and value of the first, then of the second),
    rather than one after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One `model_type` of the Hub."""

    read: Callable[[Any], ModelConfig]
    """transformers' configuration, made from config.json -> ModelConfig; refuses what it would get
    wrong."""
    write: Callable[[ModelConfig], dict[str, Any]] | None = None
    """ModelConfig -> config.json, for families that fresh seeds are made of."""
    tensors: Mapping[str, Tensor]
    """Tensor name -> what it holds; `{}` stands for the layer number."""
    prefix: str = ""
    """Start of most tensor names, left out in checkpoints that were saved without a head."""
    ignored: tuple[str, ...] = ()
    """Parts of tensor names that some checkpoints carry and a language model does not use."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensor that some checkpoints carry -> the one that it must be the same as. A tied head need
    not be named here."""
    with_head: str = ""
    """An encoder's checkpoint on the Hub that has its masked-language-model head."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Ends of tensor names in old checkpoints -> ends in the table."""

    def name(self, stored: str, prefixed: bool) -> str:
        """The name in the table of a tensor in a checkpoint; `prefixed`: whether its names have the
        family's prefix."""
        for old, new in self.renamed.items():
            if stored.endswith(old):
                stored = stored.removesuffix(old) + new
        return stored if prefixed or not self.prefix else self.prefix + stored


def linear(name: str, *paths: str, bias: bool = True, **layout: bool) -> dict[str, Tensor]:
    """A dense layer, or several in one."""
    ends = ("weight", "bias") if bias else ("weight",)
    return {
        f"{name}.{end}": Tensor(paths=tuple(f"{path}/{end}" for path in paths), **layout)
        for end in ends
    }


def norm(name: str, path: str) -> dict[str, Tensor]:
    """A norm's scale and bias."""
    return {
        f"{name}.weight": Tensor(paths=(f"{path}/scale",)),
        f"{name}.bias": Tensor(paths=(f"{path}/bias",)),
    }


def table(name: str, path: str) -> dict[str, Tensor]:
    """An embedding, or a bias that stands alone."""
    return {name: Tensor(paths=(path,))}


# Of the families from before Llama, decoders and encoders.
BIASED: Mapping[str, Any] = {
    "norm": "layer",
    "norm_bias": True,
    "gated": False,
    "query_bias": True,
    "output_bias": True,
    "feedforward_bias": True,
}


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
    """`value`, which must be one of those known."""
    if value not in known:
        wanted = " or ".join(map(str, known))
        raise UserError(f"{name} must be {wanted} for this model; config.json has {value}")
    return value


def activation(name: str, value: str) -> Activation:
    """Our name of an activation."""
    return ACTIVATIONS[want(name, value, list(ACTIVATIONS))]


def rope(found: Mapping[str, Any]) -> Rope:
    """Rotary settings, of all layers or of one kind of them."""
    kind = want("rope_type", found["rope_type"], ["default", "linear", "llama3", "yarn"])
    want("partial_rotary_factor", found.get("partial_rotary_factor", 1.0), [1.0])
    theta = found["rope_theta"]
    if not isinstance(theta, int | float):
        raise UserError(f"rope_theta must be a number; config.json has {theta}")
    settings: dict[str, Any] = {"theta": float(theta)}
    if kind != "default":
        settings |= {"scaling": kind, "factor": float(found["factor"])}
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


def _yarn_amplitude(found: Mapping[str, Any], factor: float) -> float:
    """Peng et al. 2023, eq. 22, and the quotient of two such that DeepSeek asks for."""
    if found.get("attention_factor") is not None:
        return float(found["attention_factor"])

    def grown(share: float) -> float:
        return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0

    share, all_share = found.get("mscale"), found.get("mscale_all_dim")
    return grown(share) / grown(all_share) if share and all_share else grown(1.0)


def local(window: int | None, kinds: Sequence[str]) -> dict[str, Any]:
    """Settings of a model in which the layers of some kinds see a window alone."""
    for kind in kinds:
        want("layer_types", kind, ["full_attention", "sliding_attention"])
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    if window is None or not layers:
        return {}
    return {"local_window": window, "local_layers": layers}
