"""What a decoder looks like, as plain values. Imports no JAX, so that the command line stays quick.

The letters used for array dimensions everywhere in xelm:
B batch, T tokens, S key positions, D width, F feed-forward, N heads, K key heads, H head size,
V vocabulary, L layers, E experts, C clusters.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of one decoder-only language model; covers the Llama and the XGLM families."""

    vocabulary_size: int
    """V, rows of the embedding."""
    width: int
    """D, size of the residual stream."""
    feedforward_width: int
    """F, hidden size of the feed-forward layer."""
    layer_count: int
    """L, number of transformer blocks."""
    head_count: int
    """N, query heads."""
    key_head_count: int
    """K, key and value heads; each serves N / K query heads."""
    head_size: int
    """H, size of one head; N * H need not be D."""
    max_length: int
    """Longest sequence, in tokens, the checkpoint declares."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (scale only) or LayerNorm (scale and bias)."""
    norm_epsilon: float = 1e-6
    """Added to the variance inside the norm."""
    activation: Literal["silu", "gelu"] = "silu"
    """Non-linearity of the feed-forward layer; gelu is the exact one, with erf."""
    gated: bool = True
    """Feed-forward is down(act(gate(x)) * up(x)) when true, down(act(up(x))) when false."""
    attention_bias: bool = False
    """Query, key, value and output projections carry a bias."""
    feedforward_bias: bool = False
    """Feed-forward projections carry a bias."""
    positions: Literal["rope", "sinusoidal"] = "rope"
    """Rotary positions inside attention, or fixed sinusoids added to the embedding."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    position_offset: int = 0
    """Added to sinusoidal positions before look-up (2 for XGLM, after fairseq)."""
    embedding_scale: float = 1.0
    """Token embeddings are multiplied by this (sqrt(D) for XGLM)."""
    tie_embeddings: bool = True
    """The output head is the embedding; otherwise it has a matrix of its own."""

    def __post_init__(self) -> None:
        for name in (
            "vocabulary_size",
            "width",
            "feedforward_width",
            "layer_count",
            "head_count",
            "key_head_count",
            "head_size",
            "max_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.head_count % self.key_head_count:
            raise ValueError(
                f"head_count must be a multiple of key_head_count; got {self.head_count} and "
                f"{self.key_head_count}"
            )
        if self.positions == "rope" and self.head_size % 2:
            raise ValueError(f"head_size must be even for rotary positions; got {self.head_size}")

    @property
    def parameter_count(self) -> int:
        """Number of trainable values, the embedding included."""
        d, f, heads = self.width, self.feedforward_width, self.head_count * self.head_size
        keys = self.key_head_count * self.head_size
        norm = d * (2 if self.norm == "layer" else 1)
        attention = d * (heads + 2 * keys) + heads * d
        if self.attention_bias:
            attention += heads + 2 * keys + d
        feedforward = d * f * (3 if self.gated else 2)
        if self.feedforward_bias:
            feedforward += f * (2 if self.gated else 1) + d
        embedding = self.vocabulary_size * d * (1 if self.tie_embeddings else 2)
        return self.layer_count * (attention + feedforward + 2 * norm) + norm + embedding
