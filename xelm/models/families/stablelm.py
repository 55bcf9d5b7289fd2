"""StableLM 2 and StableLM 3B."""

from typing import Any

from xelm.models.config import ModelConfig
from xelm.models.families.family import Family, require, rope
from xelm.models.families.llama import TENSORS, llama_like


def _read(hub: Any) -> ModelConfig:
    # StableLM 2 12B stores the norm of each head as a tensor of its own.
    require(hub, qk_layernorm=False)
    return llama_like(
        hub,
        norm="layer",
        norm_bias=True,
        norm_epsilon=hub.layer_norm_eps,
        parallel="one norm" if hub.use_parallel_residual else "no",
        query_bias=hub.use_qkv_bias,
        rope=rope(hub.rope_parameters, partial=True),
    )


# Bellagente et al. 2024, arXiv 2402.17834.
STABLELM = Family(read=_read, tensors=TENSORS, prefix="model.", ignored=("rotary_emb.inv_freq",))
