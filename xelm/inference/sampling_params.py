"""Sampling parameters as plain values. Imports nothing heavy, so that flags can be made of them."""

import math
from dataclasses import dataclass

from clustering.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How a continuation is sampled, and where it ends."""

    max_new_tokens: int = 40
    """Largest number of tokens to generate."""
    temperature: float = 0.8
    """Temperature of sampling, which divides log probabilities; 0 takes the most probable token."""
    top_k: int | None = None
    """Number of most probable tokens to sample from. None: all."""
    top_p: float = 0.95
    """Probability that the most probable tokens to sample from have together; 1 takes all."""
    repetition_penalty: float = 1.0
    """Penalty on tokens that the text contains already: it divides positive logits and multiplies
    negative ones."""
    # Keskar et al. 2019, arXiv 1909.05858, section 4.1
    stop: tuple[str, ...] = ()
    """Text before which the continuation ends."""
    random_seed: int = 0
    """Random seed of sampling."""

    def __post_init__(self) -> None:
        faults = [
            fault
            for wrong, fault in (
                (self.max_new_tokens < 1, f"max_new_tokens at least 1; got {self.max_new_tokens}"),
                (
                    not 0 <= self.temperature < math.inf,
                    f"temperature at least 0; got {self.temperature}",
                ),
                (
                    self.top_k is not None and self.top_k < 1,
                    f"top_k at least 1; got {self.top_k}",
                ),
                (not 0 < self.top_p <= 1, f"top_p above 0 and at most 1; got {self.top_p}"),
                (
                    not 0 < self.repetition_penalty < math.inf,
                    f"repetition_penalty above 0; got {self.repetition_penalty}",
                ),
                ("" in self.stop, "stop strings that are not empty"),
            )
            if wrong
        ]
        if faults:
            raise UserError(f"generating wants {'; '.join(faults)}")


GREEDY = SamplingParams(temperature=0.0)
