"""How a language model is trained, as plain values, checked when made. Imports no JAX."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training: budget, batches, optimiser, schedule, precision and checkpoints."""

    tokens: int
    """Budget: tokens predicted over the whole training; the last step may overshoot it."""
    sequence_length: int = 512
    """T, tokens a row; documents are packed into rows and do not attend to each other."""
    batch_size: int = 32
    """Rows an optimiser step sees, over all accumulation steps."""
    accumulation_steps: int = 1
    """The batch is worked off in this many equal parts; the update is the same."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """Decay after warm-up. wsd (warmup-stable-decay) is flat, then linear to the final rate."""
    warmup_share: float = 0.05
    """Share of the steps in which the rate rises linearly from zero."""
    decay_share: float = 0.2
    """Share of the steps in which wsd decays; the other schedules decay from the warm-up on."""
    final_rate_share: float = 0.1
    """Rate at the last step, as a share of the peak."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; vectors (norms, biases) are not decayed."""
    beta1: float = 0.9
    """AdamW's decay of the gradient average."""
    beta2: float = 0.95
    """AdamW's decay of the squared-gradient average; .95 as usual for language models."""
    clip_norm: float = 1.0
    """Gradients are scaled down to at most this global norm."""
    sampling_exponent: float = 0.3
    """A language is seen in proportion to (its tokens) ** this: 0 is uniform, 1 proportional."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products; parameters, norms, softmax and losses stay float32."""
    rematerialise: bool = False
    """Recompute activations in the backward pass: less memory, about a third more work."""
    seed: int = 0
    """Orders documents and rows, and initialises a fresh model."""
    checkpoint_every: int = 200
    """Steps between checkpoints of the unfinished training."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    mesh_data: int = 0
    """Devices over which rows are spread; 0 takes all that the other mesh axes leave."""
    mesh_fsdp: int = 1
    """Devices over which rows and each parameter are spread."""
    mesh_tensor: int = 1
    """Devices over which heads, feed-forward and vocabulary are spread."""
    tensorboard: bool = False
    """Also write TensorBoard events beside the metrics (needs the tensorboard package)."""

    def __post_init__(self) -> None:
        faults = []
        for name in ("tokens", "sequence_length", "batch_size", "accumulation_steps",
                     "checkpoint_every", "log_every", "mesh_fsdp", "mesh_tensor"):
            if getattr(self, name) < 1:
                faults.append(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("warmup_share", "decay_share", "final_rate_share", "sampling_exponent"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"{name} must be between 0 and 1; got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                faults.append(f"{name} must be above 0; got {getattr(self, name)}")
        if self.accumulation_steps > 0 and self.batch_size % self.accumulation_steps:
            faults.append(
                f"batch_size must be a multiple of accumulation_steps; got {self.batch_size} and "
                f"{self.accumulation_steps}"
            )
        if faults:
            raise ValueError("; ".join(faults[:5]))

    @property
    def tokens_per_step(self) -> int:
        """Positions an optimiser step sees (padding and first tokens of documents included)."""
        return self.batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        """Optimiser steps that fill the budget, at least one."""
        return max(1, round(self.tokens / self.tokens_per_step))
