"""OLMo 2 and 3."""

from typing import Any

from xelm.models.config import ModelConfig
from xelm.models.families.family import Family, local, norm, rope_of
from xelm.models.families.llama import TENSORS, llama_like


def _read_olmo2(hub: Any, **settings: Any) -> ModelConfig:
    return llama_like(
        hub,
        norm_placement="result",
        head_norm=True,
        head_norm_form="joint",
        query_bias=hub.attention_bias,
        output_bias=hub.attention_bias,
        **settings,
    )


def _read_olmo3(hub: Any) -> ModelConfig:
    return _read_olmo2(
        hub,
        # Only global layers are stretched.
        rope=rope_of(hub, "full_attention"),
        local_rope=rope_of(hub, "sliding_attention"),
        **local(hub.sliding_window, hub.layer_types),
    )


_COMMON: dict[str, Any] = {
    "tensors": {
        **TENSORS,
        **norm("model.layers.{}.post_attention_layernorm", "blocks/attention_result_norm"),
        **norm("model.layers.{}.post_feedforward_layernorm", "blocks/feedforward_result_norm"),
    },
    "prefix": "model.",
}
# Team OLMo 2025, arXiv 2501.00656.
OLMO2 = Family(read=_read_olmo2, **_COMMON)
# Team OLMo 2025, arXiv 2512.13961.
OLMO3 = Family(read=_read_olmo3, **_COMMON)
