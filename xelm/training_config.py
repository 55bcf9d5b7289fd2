"""Settings of one training: immutable values, checked when they are made.

Imports no JAX, so that the command line starts quickly.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from xelm.bounds import (
    NOT_NEGATIVE,
    NOT_NEGATIVE_OR_NONE,
    POSITIVE,
    POSITIVE_OR_NONE,
    SHARE,
    faults_of,
)
from xelm.models.config import TARGETS


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
            *faults_of(self, ("tokens", "sequence_length", "batch_size"), *POSITIVE),
            *faults_of(
                self, ("passes", "max_passes"), lambda x: x is None or 0 < x < math.inf, "above 0"
            ),
            *faults_of(self, ("random_seed",), *NOT_NEGATIVE),
            *_optimizer_faults(self.optimizer),
            *_part_faults(self),
            *faults_of(self.data, ("sampling_exponent",), *SHARE, "data."),
            *faults_of(self.data, ("mask_share",), lambda x: 0 < x < 1, "between 0 and 1", "data."),
            *faults_of(self.data, ("replay_share",), lambda x: 0 <= x < 1, "in 0..1", "data."),
            *faults_of(self.evaluation, ("every", "patience"), *POSITIVE_OR_NONE, "evaluation."),
            *faults_of(self.evaluation, ("tokens",), *POSITIVE, "evaluation."),
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
            faults += faults_of(self.optimizer, names, lambda x: x <= 0.95, wanted, "optimizer.")
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


def _optimizer_faults(config: OptimizerConfig) -> list[str]:
    rates, averages = ("learning_rate", "clip_norm"), ("beta1", "beta2")
    shares = ("warmup_share", "decay_share", "final_rate_share")
    return [
        *faults_of(config, rates, lambda x: 0 < x < math.inf, "above 0", "optimizer."),
        *faults_of(config, shares, *SHARE, "optimizer."),
        *faults_of(config, averages, lambda x: 0 <= x < 1, "at least 0 and below 1", "optimizer."),
        *faults_of(config, ("weight_decay",), *NOT_NEGATIVE, "optimizer."),
        *faults_of(config, ("pull",), *NOT_NEGATIVE_OR_NONE, "optimizer."),
    ]


def _part_faults(config: TrainConfig) -> list[str]:
    """Faults in the settings of what is trained."""
    lora, frozen = config.lora, config.frozen_layers
    faults = [
        *faults_of(lora, ("rank",), *POSITIVE_OR_NONE, "lora."),
        *faults_of(lora, ("alpha",), lambda x: x is None or 0 < x < math.inf, "above 0", "lora."),
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
        *faults_of(config, counts, *POSITIVE, "runtime."),
        *faults_of(config, ("keep_every", "mesh_data"), *POSITIVE_OR_NONE, "runtime."),
    ]
