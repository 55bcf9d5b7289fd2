"""The shape of a transformer as plain values. Imports no JAX, so that the command line starts fast.

The letters used for array dimensions everywhere in xelm:
B batch, T tokens, S key positions, D width, F feed-forward, N heads, K key heads, H head size,
V vocabulary, L layers, E experts, C clusters."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Literal, get_args

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "xielu"]
"""Non-linearity of a feed-forward layer; gelu is the exact one, with erf, and xielu has two
parameters in each layer (Huang and Schlag 2024, arXiv 2411.13010)."""

WeightsDtype = Literal["float32", "bfloat16", "int8"]
WEIGHTS_DTYPES = get_args(WeightsDtype)
"""Dtypes in which weights may lie in memory for inference (`xelm.models.narrow`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Settings of rotary positions (Su et al. 2021, arXiv 2104.09864) and of their scaling."""

    theta: float = 10_000.0
    """Base of the rotary frequencies."""
    partial_rotary_factor: float = 1.0
    """Share of each head that positions rotate, its first values; the others stay as they are."""
    scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    """linear: Chen et al. 2023, arXiv 2306.15595. llama3: Llama 3.1, arXiv 2407.21783, as released.
    yarn: Peng et al. 2023, arXiv 2309.00071. longrope: Ding et al. 2024, arXiv 2402.13753, for
    sequences up to the original length."""
    factor: float = 1.0
    """Low frequencies are divided by this (all of them, if linear)."""
    original_length: int | None = None
    """Longest sequence before the scaling, in tokens; read by llama3, yarn, longrope and
    `query_growth`."""
    short_factors: tuple[float, ...] = ()
    """Divisor of each frequency in sequences up to the original length; read by longrope."""
    slowest: float = 1.0
    """Frequencies with fewer turns than this over the original length are divided by the whole
    factor: low_freq_factor of llama3, beta_slow of yarn."""
    fastest: float = 4.0
    """Frequencies with more turns than this are not divided: high_freq_factor of llama3, beta_fast
    of yarn."""
    truncate: bool = True
    """Whether the dimensions of `slowest` and `fastest` are rounded outwards; read by yarn."""
    amplitude: float = 1.0
    """Factor of cosines and sines; read by yarn and longrope."""
    query_growth: float = 0.0
    """Queries at position p are multiplied by 1 + this * log(1 + floor(p / original_length)), so
    that attention stays sharp in long texts (Llama 4, Ministral 3)."""
    interleaved: bool = False
    """Whether a pair that turns together is two neighbours in a head (GPT-J, Cohere), rather than
    one value of its first half and one of its second (Llama)."""

    def __post_init__(self) -> None:
        if self.theta <= 0 or self.factor <= 0:
            raise ValueError(
                f"theta and factor must be above 0; got {self.theta} and {self.factor}"
            )
        if not 0 < self.partial_rotary_factor <= 1:
            raise ValueError(
                "partial_rotary_factor must be above 0 and at most 1; got "
                f"{self.partial_rotary_factor}"
            )
        if self.scaling in ("llama3", "yarn", "longrope"):
            if self.original_length is None or self.original_length < 1:
                raise ValueError(f"rope scaling {self.scaling} needs original_length")
            if self.scaling != "longrope" and self.slowest >= self.fastest:
                raise ValueError(
                    f"slowest must be below fastest; got {self.slowest} and {self.fastest}"
                )
        if self.query_growth and not self.original_length:
            raise ValueError("query_growth needs original_length")

    def rotated(self, head_size: int) -> int:
        """Number of values of a head that are rotated."""
        return int(head_size * self.partial_rotary_factor)


TARGETS: Mapping[str, str] = {
    "q": "blocks/query",
    "k": "blocks/key",
    "v": "blocks/value",
    "o": "blocks/output",
    "gate": "blocks/gate",
    "up": "blocks/up",
    "down": "blocks/down",
}
"""Dense layers that can have an adapter, by short names: queries, keys, values and output of
attention, and the matrices of the feed-forward (`gate` only where the model has one)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of one transformer, decoder or encoder. docs/models.md says which families of the
    Hub use which setting."""

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

    causal: bool = True
    """Whether tokens attend to earlier ones only (decoders), or to all (encoders)."""

    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (no mean is subtracted) or LayerNorm."""
    norm_bias: bool = False
    """Norms add a bias."""
    norm_offset: float = 0.0
    """Norms multiply by this + scale (1 for Gemma)."""
    norm_epsilon: float = 1e-6
    """Added to the variance inside the norm."""
    norm_placement: Literal["before", "after", "around", "result"] = "before"
    """Where norms stand. before: a sub-layer's input passes one. after: the sum with its result
    does (BERT). around: its input does and, by another norm, its result before the sum (Gemma).
    result: its result does, and not its input (OLMo 2)."""
    parallel: Literal["no", "one norm", "two norms"] = "no"
    """Whether attention and feed-forward both read the input of the layer, and their results are
    added to it together (GPT-J; Chowdhery et al. 2022, arXiv 2204.02311, section 2). one norm:
    after the same norm (Cohere). two norms: each after its own (GPT-NeoX)."""
    residual_scale: float = 1.0
    """Results of attention and feed-forward are multiplied by this before the sum (Granite)."""
    first_norm: bool = True
    """The first attention has a norm before it (not in ModernBERT, whose embeddings have one)."""
    embedding_norm: bool = False
    """Embeddings, positions included, pass a norm."""
    final_norm: bool = True
    """The last states pass a norm."""

    activation: Activation = "silu"
    """Non-linearity of the feed-forward layer."""
    gated: bool = True
    """Feed-forward is down(act(gate(x)) * up(x)) when true, down(act(up(x))) when false."""
    feedforward_bias: bool = False
    """Feed-forward projections carry a bias."""
    expert_count: int = 0
    """E, feed-forwards of each layer, between which a router chooses for each token (Mixtral); 0:
    one, without a router."""
    experts_per_token: int = 0
    """Number of them that a token passes."""
    expert_weights_sum_to_one: bool = True
    """The router's probabilities of a token's experts are scaled to sum 1 (norm_topk_prob of the
    Hub); otherwise the results are added with the probabilities themselves."""

    query_bias: bool = False
    """Query, key and value projections carry a bias."""
    output_bias: bool = False
    """The attention's output projection carries a bias."""
    head_norm: bool = False
    """Queries and keys pass a norm before positions."""
    head_norm_form: Literal["shared", "each", "joint"] = "shared"
    """What `head_norm` normalises. shared: each head by an RMSNorm with the same scales for all.
    each: each head by a norm of the kind of `norm` with its own scales, without bias (Cohere).
    joint: all heads together by one RMSNorm (OLMo 2)."""
    head_norm_after_positions: bool = False
    """Queries and keys pass `head_norm` after rotary positions (Hunyuan)."""
    attention_scale: float | None = None
    """Scores are multiplied by this; None is H ** -0.5."""
    attention_cap: float | None = None
    """Scores s become cap * tanh(s / cap) (Gemma 2)."""
    local_window: int | None = None
    """In local layers a token at i sees j with |i - j| < this; in none if None."""
    local_layers: tuple[int, ...] = ()
    """Numbers of the layers whose attention is local, from 0."""

    positions: Literal["rope", "alibi", "learned", "sinusoidal"] = "rope"
    """Rotary, or linear biases (Press et al. 2022, arXiv 2108.12409), inside attention; learned or
    fixed vectors added to the embedding."""
    rope: Rope = field(default_factory=Rope)
    """Rotary positions of all layers, or of the global ones if `local_rope` is given."""
    local_rope: Rope | None = None
    """Rotary positions of the local layers; None if they are those of all layers."""
    nope_layers: tuple[int, ...] = ()
    """Numbers of the layers without rotary positions, from 0 (NoPE: Kazemnejad et al. 2023, arXiv
    2305.19466)."""
    position_offset: int = 0
    """Added to learned and sinusoidal positions before look-up (2 in fairseq's models)."""
    positions_skip_padding: bool = False
    """Positions count tokens that are not padding, rather than columns (XLM-R)."""

    embedding_scale: float = 1.0
    """Token embeddings are multiplied by this (sqrt(D) for XGLM and Gemma)."""
    token_types: int = 0
    """Rows of an embedding of sentence A or B, of which the first is added everywhere (BERT)."""
    tie_embeddings: bool = True
    """The output head is the embedding; otherwise it has a matrix of its own."""
    head_transform: bool = False
    """States pass norm(act(dense(x))) on their way to the output head (encoders)."""
    head_transform_bias: bool = False
    """The dense layer of `head_transform` carries a bias."""
    head_bias: bool = False
    """The output head carries a bias."""
    logit_scale: float = 1.0
    """Logits are multiplied by this, before the cap (Cohere)."""
    logit_cap: float | None = None
    """Logits s become cap * tanh(s / cap) (Gemma 2)."""

    def __post_init__(self) -> None:
        required = [f.name for f in fields(self) if f.default is f.default_factory is MISSING]
        for name in required:  # sizes, all of them
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.head_count % self.key_head_count:
            raise ValueError(
                f"head_count must be a multiple of key_head_count; got {self.head_count} and "
                f"{self.key_head_count}"
            )
        if not min(1, self.expert_count) <= self.experts_per_token <= self.expert_count:
            raise ValueError(
                "experts_per_token must be between 1 and expert_count, "
                f"{self.expert_count}, or 0 with 0; got {self.experts_per_token}"
            )
        for rope in filter(None, (self.rope, self.local_rope) if self.positions == "rope" else ()):
            rotated = rope.rotated(self.head_size)
            if rotated % 2 or not rotated:
                part = "" if rope.partial_rotary_factor == 1 else " times partial_rotary_factor"
                raise ValueError(
                    f"head_size{part} must be even for rotary positions; got {rotated}"
                )
            if rope.scaling == "longrope" and len(rope.short_factors) != rotated // 2:
                raise ValueError(
                    f"longrope needs {rotated // 2} short factors; got {len(rope.short_factors)}"
                )
        if self.local_layers and (self.local_window is None or self.local_window < 1):
            raise ValueError(f"local layers need a local_window; got {self.local_window}")
        for name in ("local_layers", "nope_layers"):
            numbers = getattr(self, name)
            if any(not 0 <= layer < self.layer_count for layer in numbers):
                raise ValueError(f"{name} must be of 0 to {self.layer_count - 1}; got {numbers}")
        if self.residual_scale != 1.0 and self.norm_placement == "after":
            raise ValueError("norm_placement after goes with a residual_scale of 1")
        if self.head_norm_after_positions and self.head_norm_form == "joint":
            raise ValueError("head_norm_form must be shared or each after positions; got joint")
        if self.parallel != "no" and self.norm_placement != "before":
            raise ValueError(
                f"norm_placement must be before in parallel layers; got {self.norm_placement}"
            )

    @property
    def parameter_count(self) -> int:
        """Number of trainable values, the embedding included."""
        return self._count(self.expert_count)

    @property
    def active_parameter_count(self) -> int:
        """Number of those that one token uses: of the experts, `experts_per_token`."""
        return self._count(self.experts_per_token)

    def _count(self, experts: int) -> int:
        """Number of parameters with so many of the experts of each layer."""
        d, f, heads = self.width, self.feedforward_width, self.head_count * self.head_size
        keys = self.key_head_count * self.head_size
        norm = d * (1 + self.norm_bias)
        attention = d * (heads + 2 * keys) + heads * d
        attention += self.query_bias * (heads + 2 * keys) + self.output_bias * d
        attention += (
            self.head_norm
            * {
                "shared": 2 * self.head_size,
                **dict.fromkeys(("each", "joint"), heads + keys),
            }[self.head_norm_form]
        )
        feedforward = d * f * (2 + self.gated)
        feedforward += self.feedforward_bias * (f * (1 + self.gated) + d)
        feedforward += 2 * (self.activation == "xielu")
        if self.expert_count:
            feedforward = experts * feedforward + d * self.expert_count
        norms = 4 if self.norm_placement == "around" else 2 - (self.parallel == "one norm")
        layers = self.layer_count * (attention + feedforward + norms * norm)
        layers -= 0 if self.first_norm else norm
        embedding = (self.vocabulary_size + self.token_types) * d
        embedding += d * self.position_rows + norm * self.embedding_norm
        head = norm * self.final_norm + self.vocabulary_size * self.head_bias
        head += 0 if self.tie_embeddings else self.vocabulary_size * d
        head += self.head_transform * (d * d + d * self.head_transform_bias + norm)
        return embedding + layers + head

    @property
    def position_rows(self) -> int:
        """Rows of the table of learned positions."""
        return self.max_length + self.position_offset if self.positions == "learned" else 0
