"""Settings of a RUN and of its trainings: immutable values, checked when they are made.

Imports no JAX, so that the command line starts quickly.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from clustering.errors import UserError
from xelm.models.config import TARGETS, ModelConfig
from xelm.settings import vary

StartToken = Literal["tokenizer", "bos", "eos", "config"]
TokenizerAlgorithm = Literal["bpe", "unigram"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How gradients move the parameters."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """adamw, or adafactor, which keeps squared gradients by row and column of each matrix of at
    least 128 x 128 and so needs almost no memory for them. Both suit the same learning rates."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """Decay after warm-up. wsd (warmup-stable-decay) is flat, then linear to the final rate."""
    warmup_share: float = 0.05
    """Share of the steps in which the rate rises linearly from zero."""
    decay_share: float = 0.2
    """Share of the steps in which wsd decays; the other schedules decay from the warm-up on."""
    final_rate_share: float = 0.1
    """Rate at the last step, as a share of the peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors (norms, biases) are not decayed."""
    pull: float | None = None
    """Decay of all trained parameters toward those that the training starts from, in place of
    weight_decay, which is toward zero; null: weight_decay. It takes 4 bytes a parameter."""
    beta1: float = 0.9
    """Decay of the running average of gradients (adamw) or of updates (adafactor). adafactor keeps
    no such average if this is 0."""
    beta2: float = 0.95
    """Decay of adamw's running average of squared gradients; .95 is usual for language models."""
    clip_norm: float = 1.0
    """Gradients are scaled down to at most this global norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters in place of whole weights (LoRA: Hu et al. 2021, arXiv 2106.09685): each
    weight W of the targets becomes W + alpha / rank * A B, and A and B are trained alone. Such an
    expert is published as an adapter of its parent."""

    rank: int | None = None
    """Columns of A and rows of B; null trains the weights themselves."""
    alpha: float | None = None
    """Factor of A B, which is divided by the rank; null takes twice the rank."""
    targets: str = "all"
    """Dense layers with an adapter: all, or some of q,k,v,o (attention) and gate,up,down
    (feed-forward)."""

    @property
    def scale(self) -> float:
        """Factor of A B: alpha / rank."""
        return 2.0 if self.alpha is None or self.rank is None else self.alpha / self.rank


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How languages are mixed, and which tokens an encoder predicts."""

    sampling_exponent: float = 0.3
    """A language is sampled in proportion to (its tokens) ** this: 0 is uniform, 1 proportional."""
    mask_share: float = 0.15
    """Share of the tokens that an encoder predicts (.15 in BERT, .3 in ModernBERT)."""
    replay_share: float = 0.0
    """Share of an expert's rows that replay the other languages of the RUN's corpus, which are
    neither its own nor its donor's, so that it forgets less of them. They are mixed by
    `sampling_exponent`. A seed has no other languages, and dense none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How a training is measured on held-out text while it runs. The weights of the best
    measurement are its result."""

    every: int | None = None
    """Steps between measurements; null takes a tenth of the training's."""
    tokens: int = 20_000
    """Most tokens of held-out text of each language that are read for a measurement."""
    patience: int | None = None
    """A training ends after so many measurements in a row that are not better than the best before
    them; null trains to the end of the budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig:
    """How a mixture of experts is trained; other models have no router. `xelm mix` sets these."""

    trained: Literal["all", "router"] = "all"
    """Which weights: all, or those of the routers."""
    balance: float = 0.01
    """Weight of the loss that spreads the tokens over the experts of each layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """Where and how a training runs. These settings may change whenever it is resumed."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of matrix products and, with bfloat16, of the matrices that a step reads and of
    their gradients, also where these are summed over devices. Master weights, norms, softmax,
    losses and sums over accumulated parts stay float32."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the optimiser's averages between steps: two values for each parameter with
    adamw, one with adafactor."""
    accumulation_steps: int = 1
    """Number of equal parts in which a batch is computed; the update is the same."""
    rematerialise: bool = False
    """Whether the backward pass recomputes all of a layer but its input and the result of its
    attention, instead of only what is cheap: half the memory for activations, a fifth more time."""
    skip_limit: int = 10
    """Number of consecutive skipped steps after which a training is given up. A step is skipped,
    and counted, if its loss or gradient is not finite, or its loss far above those before it."""
    checkpoint_every: int = 200
    """Steps between checkpoints of the unfinished training."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints that are kept."""
    keep_every: int | None = None
    """Steps between further checkpoints that are kept until the training is done; null: none."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    mesh_expert: int = 1
    """Experts that are trained at a time in one program, each on its own devices."""
    mesh_data: int | None = None
    """Devices over which rows are spread; null takes all that the other mesh axes leave."""
    mesh_fsdp: int = 1
    """Devices over which rows and each parameter are spread."""
    mesh_tensor: int = 1
    """Devices over which heads, feed-forward and vocabulary are spread."""
    tensorboard: bool = False
    """Whether to write TensorBoard events too, in RUN/logs (needs xelm[tensorboard])."""
    wandb: bool = False
    """Whether to log to Weights & Biases too, in WANDB_PROJECT or xelm (needs xelm[wandb])."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How much text a training reads. A growth may begin with another budget than its RUN's, since
    its text may be much less or more than was planned for; it is resumed with the same."""

    tokens: int
    """Token budget, in positions of the rows of all steps, rounded to whole steps. The first token
    of each document and the padding of last rows count, although they are not predicted."""
    passes: float | None = None
    """Passes over all text, in place of `tokens`; of a grown expert, over its own language's text.
    null: `tokens`."""
    max_passes: float | None = None
    """Most passes over the text of a language; null sets no limit. What a language may not have,
    the others get (with data.sampling_exponent 0, UniMax); a grown expert reads fewer tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Budget):
    """Settings of one training."""

    sequence_length: int = 512
    """T, tokens in a row; documents are packed into rows and do not attend to each other."""
    batch_size: int = 32
    """Rows in an optimiser step, over all accumulation steps."""
    random_seed: int = 0
    """Seed of the order of rows, and of a fresh model's parameters. A training that continues
    another on the same text needs another seed, or it sees the same rows in the same order."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimiser and learning-rate schedule."""
    lora: LoraConfig = LoraConfig()
    """Adapters that are trained in place of the weights."""
    frozen_layers: str | None = None
    """Layers that are not trained, counted from 0, such as 4-7 or 2,4-5; "middle" is the middle
    third, and null none. Embeddings are trained all the same."""
    data: DataConfig = DataConfig()
    """Mixture of languages, and masking."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Measurements on held-out text."""
    mixture: MixtureConfig = MixtureConfig()
    """Training of mixtures of experts."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Precision, devices, checkpoints and logs, which may change when the training is resumed."""

    def __post_init__(self) -> None:
        faults = [
            *_faults(self, ("tokens", "sequence_length", "batch_size"), *_POSITIVE),
            *_faults(
                self, ("passes", "max_passes"), lambda x: x is None or 0 < x < math.inf, "above 0"
            ),
            *_faults(self, ("random_seed",), *_NOT_NEGATIVE),
            *_optimizer_faults(self.optimizer),
            *_part_faults(self),
            *_faults(self.data, ("sampling_exponent",), *_SHARE, "data."),
            *_faults(self.data, ("mask_share",), lambda x: 0 < x < 1, "between 0 and 1", "data."),
            *_faults(self.data, ("replay_share",), lambda x: 0 <= x < 1, "in 0..1", "data."),
            *_faults(self.evaluation, ("every", "patience"), *_POSITIVE_OR_NONE, "evaluation."),
            *_faults(self.evaluation, ("tokens",), *_POSITIVE, "evaluation."),
            *_runtime_faults(self.runtime),
        ]
        parts, every = self.runtime.accumulation_steps, self.runtime.checkpoint_every
        if parts > 0 and self.batch_size % parts:
            faults.append(
                "batch_size must be a multiple of runtime.accumulation_steps; got "
                f"{self.batch_size} and {parts}"
            )
        if every > 0 and (self.runtime.keep_every or 0) % every:
            faults.append(
                "runtime.keep_every must be a multiple of runtime.checkpoint_every; got "
                f"{self.runtime.keep_every} and {every}"
            )
        if self.runtime.moments_dtype == "bfloat16":
            # Changes below 1/256 are rounded away: longer averages would never move.
            names = ("beta1", "beta2") if self.optimizer.name == "adamw" else ("beta1",)
            wanted = "at most .95 for averages in bfloat16"
            faults += _faults(self.optimizer, names, lambda x: x <= 0.95, wanted, "optimizer.")
        if faults:
            raise ValueError("; ".join(faults[:5]))

    @property
    def tokens_per_step(self) -> int:
        """Positions in an optimiser step (padding and first tokens of documents included)."""
        return self.batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        """Number of optimiser steps that fill the budget, at least one."""
        return max(1, round(self.tokens / self.tokens_per_step))

    @property
    def steps_between_measurements(self) -> int:
        """Steps from one measurement on held-out text to the next."""
        return self.evaluation.every or max(1, round(self.steps / 10))


_POSITIVE = (lambda x: x >= 1), "at least 1"
_POSITIVE_OR_NONE = (lambda x: x is None or x >= 1), "at least 1"
_NOT_NEGATIVE = (lambda x: 0 <= x < 2**31), "at least 0"
_NOT_NEGATIVE_OR_NONE = (lambda x: x is None or x >= 0), "at least 0"
_SHARE = (lambda x: 0 <= x <= 1), "between 0 and 1"


def _faults(
    config: Any, names: Iterable[str], allowed: Callable[[Any], bool], wanted: str, part: str = ""
) -> list[str]:
    """Messages for the fields whose value is not allowed."""
    values = {name: getattr(config, name) for name in names}
    return [
        f"{part}{name} must be {wanted}; got {value}"
        for name, value in values.items()
        if not allowed(value)
    ]


def _optimizer_faults(config: OptimizerConfig) -> list[str]:
    rates, averages = ("learning_rate", "clip_norm"), ("beta1", "beta2")
    shares = ("warmup_share", "decay_share", "final_rate_share")
    return [
        *_faults(config, rates, lambda x: 0 < x < math.inf, "above 0", "optimizer."),
        *_faults(config, shares, *_SHARE, "optimizer."),
        *_faults(config, averages, lambda x: 0 <= x < 1, "at least 0 and below 1", "optimizer."),
        *_faults(config, ("weight_decay",), *_NOT_NEGATIVE, "optimizer."),
        *_faults(config, ("pull",), *_NOT_NEGATIVE_OR_NONE, "optimizer."),
    ]


def _part_faults(config: TrainConfig) -> list[str]:
    """Faults in the settings of what is trained."""
    lora, frozen = config.lora, config.frozen_layers
    faults = [
        *_faults(lora, ("rank",), *_POSITIVE_OR_NONE, "lora."),
        *_faults(lora, ("alpha",), lambda x: x is None or 0 < x < math.inf, "above 0", "lora."),
    ]
    unknown = [name for name in lora.targets.split(",") if name.strip() not in TARGETS]
    if unknown and lora.targets != "all":
        faults.append(
            f"lora.targets must be all, or some of {','.join(TARGETS)}; got {lora.targets}"
        )
    if frozen is not None and not re.fullmatch(r"middle|\d+(-\d+)?(,\d+(-\d+)?)*", frozen):
        faults.append(
            f"frozen_layers must be middle, or numbers such as 4-7 or 2,4-5; got {frozen}"
        )
    if lora.rank is not None and frozen is not None:
        faults.append("lora.rank and frozen_layers exclude each other: adapters freeze all layers")
    if lora.rank is not None and config.optimizer.pull is not None:
        faults.append(
            "lora.rank and optimizer.pull exclude each other: weight_decay draws adapters to "
            "nothing, which is where they start"
        )
    return faults


def _runtime_faults(config: RuntimeConfig) -> list[str]:
    steps = ("accumulation_steps", "skip_limit", "checkpoint_every", "keep_checkpoints")
    counts = (*steps, "log_every", "mesh_expert", "mesh_fsdp", "mesh_tensor")
    return [
        *_faults(config, counts, *_POSITIVE, "runtime."),
        *_faults(config, ("keep_every", "mesh_data"), *_POSITIVE_OR_NONE, "runtime."),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutConfig:
    """Text of the corpus that no training reads, on which all trainings are measured."""

    share: float = 0.01
    """Share of the documents of each language; 0 holds nothing out, and nothing is measured."""
    least_documents: int = 8
    """Least number of documents of a language, but at most a fifth of them."""
    most_tokens: int = 100_000
    """Most tokens of a language."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """What an expert must hold to be published: bits a byte on held-out text, against its parent
    and against the seed."""

    worse: float | None = 0.01
    """Most that it may be worse on any of its languages, as a share of the other's figure; null
    allows anything."""
    others: float | None = None
    """The same for its parent's figures on all other languages of the RUN; null allows anything."""
    tokens: int = 50_000
    """Most tokens of held-out text of each language that are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Settings of one X-ELM: its seed, its experts and what is grown later."""

    model: ModelConfig | None
    """Shape of a fresh seed; null where the seed is a Hugging Face checkpoint."""
    model_type: Literal["llama", "xglm"] = "llama"
    """Family that a fresh seed is written as."""
    tokenizer_algorithm: TokenizerAlgorithm = "bpe"
    """How a fresh tokenizer divides words, with bytes for unknown characters: "bpe" joins the most
    frequent pairs; "unigram" finds the likeliest division, which llama.cpp does not."""
    tokenizer_exponent: float = 0.3
    """A language's share of the tokenizer's training text is its bytes ** this."""
    start_token: StartToken = "tokenizer"
    """Token before every text, in training and after: "tokenizer" is what the seed's tokenizer
    itself puts there, which may be nothing; "bos" and "eos" are its special tokens of these names;
    "config" is what the tokenizer puts there or else the bos of config.json."""
    seed: TrainConfig
    """Training of a fresh seed; not used where the seed is given."""
    experts: TrainConfig
    """Training of all experts: `tokens` is the total, which is shared out by their languages."""
    dense_learning_rate: float
    """Peak learning rate of the dense baseline, which is otherwise trained as the experts are."""
    dense_batch_size: int
    """Rows in a step of the dense baseline. It has the tokens of all experts for one model, so it
    needs larger batches than they do to be a fair baseline."""
    grow: TrainConfig
    """Training of one grown expert."""
    donor_share: float = 0.25
    """Share of a grown expert's rows that are in its parent's languages."""
    kept_share: float = 0.5
    """Share of an expert's former languages in the rows of its own text in the version with which
    others join it."""
    weights_dtype: Literal["seed", "float32", "bfloat16"] = "seed"
    """Precision of the published weights of experts and dense baseline, which are rounded to it
    from the float32 of training; seed: that of the seed's weights."""
    held_out: HeldOutConfig = HeldOutConfig()
    """Text that no training reads."""
    gate: GateConfig = GateConfig()
    """What an expert must hold to be published."""
    vectoriser_dimensions: int = 100
    """Dimensions of the TF-IDF vectors that clusters of documents and TF-IDF routing use."""

    def __post_init__(self) -> None:
        if not 0 <= self.donor_share < 1:
            raise ValueError(f"donor_share must be in 0..1, below 1; got {self.donor_share}")
        if not 0 < self.kept_share < 1:
            raise ValueError(f"kept_share must be between 0 and 1; got {self.kept_share}")
        if self.seed.data.replay_share:
            raise ValueError("seed.data.replay_share must be 0: a seed has no other languages")
        if self.donor_share + self.grow.data.replay_share >= 1:
            raise ValueError(
                "donor_share and grow.data.replay_share must be below 1 together; got "
                f"{self.donor_share} and {self.grow.data.replay_share}"
            )
        if self.model is not None and self.seed.random_seed == self.experts.random_seed:
            raise ValueError(
                "experts.random_seed must differ from seed.random_seed, or experts and dense see "
                f"the seed's rows again in the same order; both are {self.seed.random_seed}"
            )
        others = {"experts.random_seed": self.experts.random_seed}
        if self.model is not None:
            others["seed.random_seed"] = self.seed.random_seed
        for name, other in others.items():
            if self.grow.random_seed <= other:
                raise ValueError(
                    f"grow.random_seed, from which growing counts up, must be above {name}, or "
                    "grown experts see rows of their parents again in the same order; got "
                    f"{self.grow.random_seed} and {other}"
                )
        if _of_parts(self.seed) != _of_parts(TrainConfig(tokens=1)):
            raise ValueError(
                "a fresh seed has no weights to start from: seed.lora, seed.frozen_layers and "
                "seed.optimizer.pull must be as they are by default"
            )
        for name, one in {"seed": self.seed, "grow": self.grow}.items():
            if one.runtime.mesh_expert != 1:
                raise ValueError(f"{name} is one model; {name}.runtime.mesh_expert must be 1")
        faults = _faults(self, ("vectoriser_dimensions",), *_POSITIVE)
        faults += _faults(self, ("tokenizer_exponent",), *_SHARE)
        counts, share = ("least_documents", "most_tokens"), (lambda x: 0 <= x <= 0.5)
        faults += _faults(self.held_out, ("share",), share, "between 0 and .5", "held_out.")
        faults += _faults(self.held_out, counts, *_POSITIVE, "held_out.")
        faults += _faults(self.gate, ("worse", "others"), *_NOT_NEGATIVE_OR_NONE, "gate.")
        faults += _faults(self.gate, ("tokens",), *_POSITIVE, "gate.")
        if faults:
            raise ValueError("; ".join(faults))
        try:
            _ = self.dense  # made to be checked
        except ValueError as error:
            raise ValueError(f"dense: {error}") from None

    @property
    def dense(self) -> TrainConfig:
        """Training of the dense baseline: the tokens of all experts together, sampled in the same
        shares, with a learning rate and a batch size of its own. All its weights are trained."""
        changes: dict[str, Any] = {"batch_size": self.dense_batch_size, "runtime.mesh_expert": 1}
        changes |= {"lora": LoraConfig(), "frozen_layers": None, "optimizer.pull": None}
        return vary(self.experts, changes | {"optimizer.learning_rate": self.dense_learning_rate})


def _of_parts(config: TrainConfig) -> tuple[Any, ...]:
    return config.lora, config.frozen_layers, config.optimizer.pull


def check_changeable(settings: Iterable[str], part: str, *, begins: bool = False) -> None:
    """Raises UserError for a setting that cannot change once a RUN is made: all but those of
    `RuntimeConfig` in the part "experts" or "grow", and of the gate. begins: whether the settings
    are of a training that may begin now, which can have any settings of that part."""
    donors = ["donor_share", "kept_share"] if part == "grow" else []
    allowed = [f"{part}.runtime.", "gate."] + [f"{part}.", *donors] * begins
    runtime = ", ".join(field.name for field in dataclasses.fields(RuntimeConfig))
    for name in (setting.partition("=")[0] for setting in settings):
        if not name.startswith(tuple(allowed)):
            wanted = ", ".join([f"{part}.NAME", *donors] if begins else [f"{part}.runtime.NAME"])
            names = "" if begins else f", where NAME is one of {runtime}"
            raise UserError(
                f"{name} cannot change once a RUN is made; here {wanted} and gate.NAME may be set"
                f"{names}"
            )
