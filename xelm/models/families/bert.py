"""BERT, RoBERTa, CamemBERT and XLM-RoBERTa, with their masked-language-model heads."""

from dataclasses import replace
from typing import Any

from clustering.errors import UserError
from xelm.models.config import ModelConfig
from xelm.models.families.family import (
    BIASED,
    Family,
    Tensor,
    activation,
    linear,
    norm,
    require,
    shape,
    table,
    want,
)


def _read_bert(hub: Any) -> ModelConfig:
    # An untied head has a second bias; nobody publishes one.
    require(hub, is_decoder=False, add_cross_attention=False, tie_word_embeddings=True)
    kind = getattr(hub, "position_embedding_type", "absolute")
    want("position_embedding_type", kind, ["absolute"])
    return ModelConfig(
        **shape(hub),
        **BIASED,
        feedforward_width=hub.intermediate_size,
        max_length=hub.max_position_embeddings,
        causal=False,
        norm_epsilon=hub.layer_norm_eps,
        norm_placement="after",
        embedding_norm=True,
        final_norm=False,
        activation=activation("hidden_act", hub.hidden_act),
        positions="learned",
        token_types=hub.type_vocab_size,
        head_transform=True,
        head_transform_bias=True,
        head_bias=True,
    )


def _read_xlm_roberta(hub: Any) -> ModelConfig:
    # The head's activation is gelu whatever hidden_act says.
    want("hidden_act", hub.hidden_act, ["gelu"])
    if hub.pad_token_id is None:
        raise UserError("pad_token_id must be a number; config.json has None")
    # Positions count from one after the padding's id, as in fairseq; the table has room for that.
    config, offset = _read_bert(hub), hub.pad_token_id + 1
    length = config.max_length - offset
    return replace(config, max_length=length, position_offset=offset, positions_skip_padding=True)


def _tensors(body: str, head: str, dense: str, head_norm: str) -> dict[str, Tensor]:
    layer = f"{body}.encoder.layer.{{}}"
    return {
        **table(f"{body}.embeddings.word_embeddings.weight", "embedding"),
        **table(f"{body}.embeddings.position_embeddings.weight", "positions"),
        **table(f"{body}.embeddings.token_type_embeddings.weight", "types"),
        **norm(f"{body}.embeddings.LayerNorm", "embedding_norm"),
        **linear(f"{layer}.attention.self.query", "blocks/query"),
        **linear(f"{layer}.attention.self.key", "blocks/key"),
        **linear(f"{layer}.attention.self.value", "blocks/value"),
        **linear(f"{layer}.attention.output.dense", "blocks/output"),
        **norm(f"{layer}.attention.output.LayerNorm", "blocks/attention_norm"),
        **linear(f"{layer}.intermediate.dense", "blocks/up"),
        **linear(f"{layer}.output.dense", "blocks/down"),
        **norm(f"{layer}.output.LayerNorm", "blocks/feedforward_norm"),
        **linear(f"{head}.{dense}", "transform/dense"),
        **norm(f"{head}.{head_norm}", "transform/norm"),
        **table(f"{head}.bias", "head_bias"),
        **table(f"{head}.decoder.weight", "head"),
    }


# For other tasks: the first token's state, the next sentence; and a buffer of old checkpoints.
_IGNORED = (".pooler.", "cls.seq_relationship.", ".embeddings.position_ids")
# Devlin et al. 2019, arXiv 1810.04805.
BERT = Family(
    read=_read_bert,
    tensors=_tensors("bert", "cls.predictions", "transform.dense", "transform.LayerNorm"),
    prefix="bert.",
    with_head="google-bert/bert-base-multilingual-cased",
    ignored=_IGNORED,
    copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
)
# Conneau et al. 2020, arXiv 1911.02116.
XLM_ROBERTA = Family(
    read=_read_xlm_roberta,
    tensors=_tensors("roberta", "lm_head", "dense", "layer_norm"),
    prefix="roberta.",
    with_head="FacebookAI/xlm-roberta-base",
    ignored=_IGNORED,
    copies={"lm_head.decoder.bias": "lm_head.bias"},
)
# Liu et al. 2019, arXiv 1907.11692.
ROBERTA = replace(XLM_ROBERTA, with_head="FacebookAI/roberta-base")
# Martin et al. 2020, arXiv 1911.03894.
CAMEMBERT = replace(XLM_ROBERTA, with_head="almanach/camembert-base")
